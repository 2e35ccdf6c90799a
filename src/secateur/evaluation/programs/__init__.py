"""Problems whose answer is a program: what they are, what a model is asked, and whether what it wrote is right."""
