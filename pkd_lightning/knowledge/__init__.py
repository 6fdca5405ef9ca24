"""Terms of knowledge: what students learn from a teacher beside the loss of a round's objective, a module a family."""
