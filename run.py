"""The one door to this pack outside ComfyUI: sets up what is missing, then runs one command. Needs Python 3.10 or newer, nothing else.

    python run.py demo                        pictures and a contact sheet in demo_output/
    python run.py test [TIER ...]             the tests (tiers: ops, host, server, browser) and the linters
    python run.py bench NAME [--check]        one benchmark, or a random check of its committed result
                  (regional --size sdxl|flux --device cuda: what regions cost on models of published size)
                  (filter, localize, maps or steer, --again PART ...: some parts anew, the others as they were)
                  (sliders --released CHECKOUT: the released trainer, from a clone of its repository, beside ours)
    python run.py serve [--port N]            ComfyUI with this pack and its lab models, for your browser
    python run.py lab ...                     train and measure the lab models
    python run.py families                    which model families each capability works on

CONCEPT_NODES_HOME   where the private environment lies (default: the user's cache folder)
COMFYUI_PATH         use this ComfyUI and its Python instead, without changing anything in it
"""

import sys


def main():
    # This file must also parse on the Pythons that are too old: no f-strings, no annotations.
    if sys.version_info < (3, 10):  # noqa: UP036
        version = ".".join(str(part) for part in sys.version_info[:3])
        sys.exit("run.py needs Python 3.10 or newer and this is Python " + version + " (" + sys.executable + "): run it with a newer one.")
    sys.dont_write_bytecode = True  # the pack may lie in a ComfyUI that is to stay as it is
    from setup.commands import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
