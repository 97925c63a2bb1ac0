"""Formats tables in LaTeX with booktabs."""

from __future__ import annotations

from vlmdefend.evaluation.statistics.diagnostics import ATTACKERS
from vlmdefend.reporting.tables.groups import (
    VerdictTable,
    attacker_text,
    clean_text,
    eps_text,
    ms_text,
    passes_text,
    worst_header,
    worst_text,
)

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "·": r"\textperiodcentered{}",
    "±": r"$\pm$",
}


def latex(groups: list[VerdictTable]) -> str:
    """Returns one ``table`` per verdict table, ready for ``\\input``; the best worst case of each radius is bold."""
    return "% needs \\usepackage{booktabs} and \\usepackage[T1]{fontenc}\n" + "\n".join(map(_table, groups))


def escape(text: str) -> str:
    """Escapes the special characters of LaTeX."""
    return "".join(_SPECIAL.get(c, c) for c in text)


def _table(group: VerdictTable) -> str:
    headers = ["Defense", r"$\varepsilon$", "Clean", *(a.capitalize() for a in ATTACKERS)]
    headers += [escape(worst_header(group.lines)).capitalize(), "Fwd+bwd", "ms/image"]
    flagged = any(line.flags for line in group.lines)
    rows, last = [], None
    for defense, line in group.rows:
        if last not in (None, defense):
            rows.append(r"\addlinespace")
        last = defense
        worst = escape(worst_text(line))
        cells = [
            escape(defense),
            eps_text(line),
            clean_text(line),
            *(f"${text}$" if (text := attacker_text(line, a)) == "=" else text for a in ATTACKERS),
            rf"\textbf{{{worst}}}" if group.is_best(line) else worst,
            passes_text(line.cost.deployed_forwards, line.cost.deployed_backwards),
            ms_text(line.cost.deployed_ms),
            *([escape(" ".join(line.flags))] if flagged else []),
        ]
        rows.append(" & ".join("--" if cell == "-" else cell for cell in cells) + r" \\")
    notes = [f"{footnote.word} {footnote.text}" for footnote in group.footnotes]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape(group.title)}}}",
            r"\begin{tabular}{lrrrrrlrr" + ("l" if flagged else "") + "}",
            r"\toprule",
            " & ".join([*headers, *([""] if flagged else [])]) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par{{\footnotesize {escape(note)}\par}}" for note in notes),
            r"\end{table}",
            "",
        ]
    )
