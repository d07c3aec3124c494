"""Learning without end-to-end backpropagation: layers and blocks trained by losses of their own."""
