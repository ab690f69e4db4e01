"""Mean squared error and its root."""

from tlkernels.losses.mse.api import MSELoss, RMSELoss, mse, rmse

__all__ = ["MSELoss", "RMSELoss", "mse", "rmse"]
