"""What is added to ordinary training: noise, guidance, distillation, selection."""
