"""The subcommands of ``ring-jax``, one module each: ``add_arguments(parser)`` and ``run(args) -> exit status``."""
