"""What a student learns from a teacher: the losses, and the Trainer that adds them up."""
