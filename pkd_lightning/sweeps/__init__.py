"""Many runs of one command: what each job of a multirun did, on disk, and what they found together."""
