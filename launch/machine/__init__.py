"""What runs on a rented machine."""
