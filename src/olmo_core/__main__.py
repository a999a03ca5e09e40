"""``python -m olmo_core`` is the ``olmo-core`` command."""

from olmo_core.cli.main import app

if __name__ == "__main__":
    app(prog_name="olmo-core")
