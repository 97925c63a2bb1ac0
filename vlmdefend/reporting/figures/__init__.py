"""Pictures: contact sheets and heat maps."""
