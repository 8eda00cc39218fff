"""Marks mathematical texts by a score of 0 to 1, from formulas, symbols, sums worked in plain text, and words.

Points: what only mathematics writes (environments, MathML, commands such as \\frac, formulas between dollars) counts
most; words such as `theorem` count least. Prices, paths and escapes of code are no formulas.
"""

from __future__ import annotations

import re

from datatrove.data import Document

from llmtrain.config.clean.content import MathConfig
from llmtrain.config.clean.web import WordsConfig
from llmtrain.data.clean.ngrams import WORD
from llmtrain.data.clean.step import Check

COMMANDS = (
    "frac dfrac tfrac sqrt sum prod int iint oint lim infty partial nabla cdot cdots ldots times div pm mp leq le "
    "geq ge neq approx equiv sim cong subset subseteq supset cup cap in notin forall exists implies iff rightarrow "
    "Rightarrow mapsto to alpha beta gamma delta epsilon varepsilon zeta eta theta lambda mu nu xi pi rho sigma tau "
    "phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega mathbb mathcal mathbf mathrm mathfrak "
    "operatorname vec hat bar overline binom log ln exp sin cos tan det max min sup inf gcd pmod bmod boxed ell "
    "otimes oplus langle rangle"
)
ENVIRONMENTS = "equation|align|gather|multline|eqnarray|array|[pbvBV]?matrix|cases|theorem|lemma|proof|displaymath|math"
WORDS = (
    "theorem lemma corollary proof equation equations inequality polynomial integer integers derivative integral "
    "matrix eigenvalue eigenvalues eigenvector determinant algebra algebraic calculus geometry trigonometry "
    "hypotenuse logarithm quadratic denominator numerator coefficient coefficients modulo divisible divisor "
    "isomorphism homomorphism manifold bijection injective surjective convergent differentiable topology axiom "
    "conjecture perpendicular congruent"
)
AMOUNT = r"\$?[0-9][0-9.,]{0,15}%?"
SIGN = r"[-+*/×x÷]"
TERM = r"(?<![\w\\])[A-Za-z0-9)]\^\{?-?\w|(?<!\w)[a-z]\([a-z]\) ?=(?!=)|(?<!\w)[a-z]_\{?[0-9a-z]\}?(?!\w)"
ASKED = r"\bhow (?:many|much|long|far|old)\b[^.?!\n]{3,150}\?|\bwhat (?:is|was) the (?:total|sum|product)\b"
PATTERNS: tuple[tuple[float, re.Pattern[str]], ...] = (
    (3.0, re.compile(rf"\\begin\{{(?:{ENVIRONMENTS})\*?\}}|<(?:m:)?math[ >]")),
    (2.0, re.compile(rf"(?<![A-Za-z:\\/])\\(?:{'|'.join(COMMANDS.split())})(?![A-Za-z])")),
    (1.0, re.compile(r"[∀∂∃∅∇∈∉∏∑√∝∞∠∧∨∩∪∫∬∮∴≈≅≠≡≤≥⊂⊆⊃⊇⊕⊗⊥±×÷⇒⇔ℕℤℚℝℂ²³⁻ⁿ₀₁₂ᵢ\U0001d400-\U0001d7ff]")),
    (1.0, re.compile(TERM)),  # x^2, f(x) =, a_1
    (2.0, re.compile(rf"(?<![\w.]){AMOUNT} ?(?:{SIGN} ?{AMOUNT} ?){{1,4}}= ?(?:<<)?\$?[0-9]")),  # 16 - 3 - 4 = 9
    (1.0, re.compile(r"(?<![\w.])[0-9]{0,6}[a-z] ?[-+*/] ?[0-9]{1,6}[a-z]? ?= ?-?[0-9]")),  # 2x + 3 = 7
    (0.75, re.compile(rf"\b(?:{'|'.join(WORDS.split())})\b", re.IGNORECASE)),
    (0.75, re.compile(ASKED, re.IGNORECASE)),
)
DOLLARS = re.compile(r"(?<![\\$\w])(\$\$?)(?=[^\s$])([^$\n]{1,500})(?<=[^\s$])\1(?![\w$])")
FORMULA = re.compile(r"[\\^_=<>+]|^-?[A-Za-z](?:\([a-z]\)|[,'])?$|^[0-9A-Za-z]+(?: ?[-+*/] ?[0-9A-Za-z]+)+$")
NUMBER = re.compile(r"(?<![\w.])[0-9]+(?![\w])")
BRACKETS = (("\\(", "\\)"), ("\\[", "\\]"))
FORMULA_POINTS, NUMBER_POINTS = 2.0, 0.1


def make(settings: MathConfig, words: WordsConfig) -> Check:
    """Returns the check, which sets the metadata `math`, and drops other texts where `only` is set."""

    def check(document: Document) -> str | None:
        score = document.metadata["math"] = round(math_score(document.text, settings.half), 4)
        return "no_math" if settings.only and score < settings.threshold else None

    return check


def math_score(text: str, half: float) -> float:
    """Returns p / (p + half x words + 1), p points. Numbers count only beside something else, up to as much."""
    sure = sum(weight * sum(1 for _ in pattern.finditer(text)) for weight, pattern in PATTERNS)
    sure += FORMULA_POINTS * sum(FORMULA.search(match[2]) is not None for match in DOLLARS.finditer(text))
    sure += sum(min(text.count(opens), text.count(closes)) for opens, closes in BRACKETS)
    points = sure + min(sure, NUMBER_POINTS * sum(1 for _ in NUMBER.finditer(text)))
    return points / (points + half * sum(1 for _ in WORD.finditer(text)) + 1)
