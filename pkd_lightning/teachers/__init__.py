"""Several teachers as one, and chains of assistants between a teacher and the students."""
