"""Progressive ensemble distillation: residual matrices, weak learners, and the loop that adds a student a round."""
