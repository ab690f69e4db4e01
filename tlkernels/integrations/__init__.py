"""tlkernels in the training loops of other libraries; each module needs that library alone."""
