"""Models: the selective scan, the Mamba block, the classifier and the ladder of model classes."""
