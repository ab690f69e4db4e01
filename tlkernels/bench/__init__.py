"""`tlkernels bench`: times the losses here, against PyTorch, other libraries and the limits of the machine."""
