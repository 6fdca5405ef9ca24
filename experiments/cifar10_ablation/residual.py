"""The residual network, by the import path that the runs of this study and of cifar10_best name."""

from pkd_lightning.models.residual import ResidualNetwork as ResidualNetwork
