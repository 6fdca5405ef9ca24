"""What a user adds: one .py and one .yaml each, none of them in the package."""
