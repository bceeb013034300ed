"""``python -m trt_kd.cli`` is ``trt-kd``."""

from trt_kd.cli import main

if __name__ == "__main__":
    main()
