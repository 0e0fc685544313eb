"""One set of Triton models and questions, for Doorstep and for a real Triton; Triton's answers are on record."""
