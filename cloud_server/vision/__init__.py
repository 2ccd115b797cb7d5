"""From latents to what a backend reads: the transform-neck and CLIP."""
