"""The fronts that cloud vendors call: SageMaker's and Vertex AI's. Listeners of their own, the same server behind."""
