"""What is tried: answers are recorded once, and settings of the learner are set side by side on them."""
