"""Says which endings source files of a repository have, and in what language they are."""

from __future__ import annotations

import os

LANGUAGES = {
    "ada": ".adb .ads",
    "assembly": ".asm .s",
    "c": ".c .h",
    "clojure": ".clj .cljc .cljs",
    "cmake": ".cmake cmakelists.txt",
    "cpp": ".cc .cpp .cxx .hh .hpp .hxx .inl",
    "csharp": ".cs",
    "css": ".css .less .scss",
    "cuda": ".cu .cuh",
    "dart": ".dart",
    "dockerfile": ".dockerfile dockerfile",
    "elixir": ".ex .exs",
    "elm": ".elm",
    "erlang": ".erl .hrl",
    "fortran": ".f .f03 .f08 .f90 .f95 .for",
    "fsharp": ".fs .fsi .fsx",
    "glsl": ".frag .glsl .vert",
    "go": ".go",
    "graphql": ".gql .graphql",
    "groovy": ".gradle .groovy",
    "haskell": ".hs .lhs",
    "html": ".htm .html",
    "java": ".java",
    "javascript": ".cjs .js .jsx .mjs",
    "json": ".json",
    "julia": ".jl",
    "kotlin": ".kt .kts",
    "latex": ".bib .cls .sty .tex",
    "lisp": ".el .lisp .lsp",
    "lua": ".lua",
    "makefile": ".mak .mk gnumakefile makefile",
    "markdown": ".markdown .md",
    "matlab": ".m",
    "nim": ".nim",
    "nix": ".nix",
    "ocaml": ".ml .mli",
    "pascal": ".dpr .pas .pp",
    "perl": ".pl .pm",
    "php": ".php",
    "powershell": ".ps1 .psd1 .psm1",
    "prolog": ".pro",
    "protobuf": ".proto",
    "python": ".py .pyi .pyx",
    "r": ".r .rmd",
    "rst": ".rst",
    "ruby": ".rake .rb gemfile rakefile",
    "rust": ".rs",
    "scala": ".sc .scala",
    "scheme": ".rkt .scm",
    "shell": ".bash .sh .zsh",
    "solidity": ".sol",
    "sql": ".sql",
    "swift": ".swift",
    "tcl": ".tcl",
    "terraform": ".tf",
    "toml": ".toml",
    "typescript": ".ts .tsx",
    "verilog": ".sv .svh .v .vh",
    "vhdl": ".vhd .vhdl",
    "xml": ".xml .xsd .xslt",
    "yaml": ".yaml .yml",
    "zig": ".zig",
}
BY_ENDING = {ending: language for language, endings in LANGUAGES.items() for ending in endings.split()}
VENDORED = frozenset(
    {"__pycache__", "bower_components", "dist-packages", "jspm_packages", "node_modules", "pods", "site-packages"}
    | {"third-party", "third_party", "thirdparty", "vendor", "vendored", "venv"}
)
"""Names of directories that hold what others wrote, in small letters."""


def language_of(path: str) -> str | None:
    """Returns the language of a file by its ending or whole name, None for one that is not listed."""
    name = os.path.basename(path).lower()
    return BY_ENDING.get(name) or BY_ENDING.get(os.path.splitext(name)[1])
