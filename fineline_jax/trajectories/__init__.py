"""What score curves mean. Reads tables; knows no JAX."""
