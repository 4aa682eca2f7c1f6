"""`python -m swaa_flex`, which is also what `accelerate launch -m` starts."""

from .cli import main

if __name__ == "__main__":
    main()
