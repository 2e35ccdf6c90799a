"""Tasks of lm-eval: multiple choice, which is answered by likelihood, and questions whose answers are read."""
