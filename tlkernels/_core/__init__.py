"""What no single loss owns."""
