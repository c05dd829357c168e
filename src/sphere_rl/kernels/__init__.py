"""What runs thousands of times a second, in terms of tensors and lists alone."""
