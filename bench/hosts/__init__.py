"""What losses in the training loops of other libraries cost, ours and theirs."""
