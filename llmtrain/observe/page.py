"""Holds the report's HTML, a Jinja template that escapes all values. It has no script; images lie beside the page."""

from __future__ import annotations

STYLE = """\
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1f2933; background: #fff;
       max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; letter-spacing: -.02em; margin: 0; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 3rem 0 .75rem; padding-top: 1rem;
     border-top: 1px solid #e4e7eb; }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
nav { margin: .4rem 0 0; } nav a { margin-right: 1rem; color: #2563eb; text-decoration: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; color: #616e7c; border-bottom: 1px solid #cbd2d9; padding: .4rem .7rem; }
td { text-align: right; border-bottom: 1px solid #eef0f2; padding: .4rem .7rem; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-weight: 600; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
article { border: 1px solid #e4e7eb; border-radius: 8px; padding: .7rem 1rem; margin: .7rem 0; }
pre { font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
      overflow-wrap: anywhere; margin: .2rem 0; }
.prompt { color: #7b8794; }
.facts span { font-size: .78rem; border-radius: 99px; padding: .1rem .6rem; margin-right: .35rem; background: #eef0f2; }
.facts .right { background: #d9f2e3; color: #14532d; } .facts .wrong { background: #fbe4e1; color: #7f1d1d; }
details { border: 1px solid #e4e7eb; border-radius: 8px; padding: .5rem 1rem; margin: .5rem 0; }
summary { cursor: pointer; font-weight: 500; }
.note { color: #7b8794; font-size: .85rem; }"""

HEAD = (
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} · {{ made_by }}</title>
<style>
"""
    + STYLE
    + """
{{ more_style }}
</style>
</head>
<body>
{%- macro table(rows, kind="") %}
<div class="scroll"><table class="{{ kind }}">
<tr>{% for name in rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{%- for row in rows %}
<tr>{% for value in row.values() %}<td>{{ value }}</td>{% endfor %}</tr>
{%- endfor %}
</table></div>
{%- endmacro %}"""
)
"""Begins every page, with the macro `table`. It asks for `title`, `made_by` and `more_style`."""

PAGE = (
    HEAD
    + """
{%- macro picture(image) %}
<img src="{{ image.file | urlencode }}" alt="{{ image.alt }}">
{%- endmacro %}
<h1>{{ title }}</h1>
<nav>
{%- for page in cleaning %}<a href="{{ page | urlencode }}">Data: what was cleaned</a>{% endfor %}
{%- if evaluations %}<a href="#evaluation">Evaluation</a>{% endif %}
{%- if trained %}<a href="#training">Training</a>{% endif %}
{%- if judged %}<a href="#judged">Judging</a>{% endif %}
{%- if transcripts %}<a href="#transcripts">Transcripts</a>{% endif %}
{%- if samples %}<a href="#samples">Samples</a>{% endif %}
{%- if configs %}<a href="#config">Configuration</a>{% endif %}
</nav>
{% if evaluations %}
<h2 id="evaluation">Evaluation on held-out data</h2>
{{- table(evaluations) }}
{%- if evaluation_image %}{{ picture(evaluation_image) }}{% endif %}
{%- for image in spent_images %}{{ picture(image) }}{% endfor %}
{%- if "cpu s" in evaluations[0] %}
<p class="note">Samples and CPU-seconds are those of all stages of this run that a model was made from.</p>
{%- endif %}
{%- if texts %}
<h3>Held-out text by source</h3>
{{- table(texts) }}
{%- endif %}
{%- for task, rows in tasks.items() %}
<h3>{{ task }}</h3>
{{- table(rows) }}
{%- endfor %}
{%- if passes_image %}{{ picture(passes_image) }}{% endif %}
{%- if tasks or passes_image %}
<p class="note">In parentheses, and as bands: 95 % intervals by bootstrap over the problems.</p>
{%- endif %}
{% endif %}
{% if trained %}
<h2 id="training">Training</h2>
{{- table(trained) }}
<p class="note">Arrows go from the mean over the first tenth of the steps to that over the last tenth;
tokens a second are the median of the steps.</p>
{%- if samples_image %}{{ picture(samples_image) }}{% endif %}
{%- for stage, images in curves.items() %}
<h3>{{ stage }}</h3>
{%- for image in images %}{{ picture(image) }}{% endfor %}
{%- endfor %}
{% endif %}
{% if judged %}
<h2 id="judged">Judging</h2>
{%- for stage, rows in judged.items() %}
<h3>{{ stage }}</h3>
{{- table(rows) }}
{%- endfor %}
{% endif %}
{% if transcripts %}
<h2 id="transcripts">Transcripts</h2>
{%- for stage, records in transcripts.items() %}
<h3>{{ stage }}</h3>
{%- for t in records %}
<article>
<pre class="prompt">{{ t.prompt }}</pre>
{%- for turn in t.turns %}
<div class="facts"><span>{{ turn.kind }}</span>{% if turn.principle %}<span>{{ turn.principle }}</span>{% endif %}</div>
<pre>{{ turn.text }}</pre>
{%- endfor %}
{%- if t.lost %}<div class="facts"><span class="wrong">{{ t.lost }}</span></div>{% endif %}
</article>
{%- endfor %}
{%- endfor %}
{% endif %}
{% if samples %}
<h2 id="samples">Sample completions</h2>
{%- for stage, records in samples.items() %}
<h3>{{ stage }}</h3>
{%- for s in records %}
<article>
<pre class="prompt">{{ s.prompt }}</pre>
<pre>{{ s.completion }}</pre>
<div class="facts">
{%- if s.reward is number -%}
<span class="{{ 'right' if s.reward >= 1 else 'wrong' }}">reward {{ '%.3g' % s.reward }}</span>
{%- endif %}
{%- if s.greedy %}<span>greedy</span>{% endif %}
{%- if s.label %}<span>{{ s.label }}</span>{% endif %}
{%- if s.step %}<span>step {{ s.step }}</span>{% endif %}
</div>
</article>
{%- endfor %}
{%- endfor %}
{% endif %}
{% if configs %}
<h2 id="config">Configuration</h2>
{%- for stage, text in configs.items() %}
<details><summary>{{ stage }}</summary><pre>{{ text }}</pre></details>
{%- endfor %}
{% endif %}
</body>
</html>
"""
)
