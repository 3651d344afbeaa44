"""Moving MNIST: digit sources, the bouncing generator, the official file, digit maps and device-resident clips."""
