"""What pyproject.toml cannot say without settings that setuptools calls experimental: the one extension in C."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "specx.storage.codecs._pfor",
            ["storage/codecs/_pfor.c"],
            # Loops become vectors, which -O2 of older compilers does not do.
            extra_compile_args=["-O3"],
            py_limited_api=True,
            # Where there is no compiler storage/codecs/pfor_numpy.py does the same in numpy.
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
