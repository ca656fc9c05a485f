"""What a diffusion model is to the method: the protocol, schedules, attention, layers, adapters."""
