"""Training the parts that this project makes itself: codec, neck, connector. Everything resumes where it stopped."""
