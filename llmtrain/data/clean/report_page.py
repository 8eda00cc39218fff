"""Holds the HTML of the cleaning report, a Jinja template that escapes all values. It has no script, and its images."""

from __future__ import annotations

from llmtrain.observe.page import HEAD

MORE_STYLE = """\
.warning { border-color: #f0b8b0; background: #fdf3f1; }
.wide td:nth-child(2) { text-align: left; font-weight: 600; }
.wide td:last-child { white-space: normal; text-align: left; }
pre, bdi { unicode-bidi: isolate; }"""

PAGE = (
    HEAD
    + """
{%- macro picture(name, alt) %}
<img src="data:image/png;base64,{{ images[name] }}" alt="{{ alt }}">
{%- endmacro %}
{%- macro example(e) %}
<article>
<pre>{{ e.text }}</pre>
<div class="facts"><span><bdi>{{ e.id }}</bdi></span>
{%- for key in ("source", "url", "language", "copy_of") if e[key] -%}
<span>{{ "copy of " if key == "copy_of" }}<bdi>{{ e[key] }}</bdi></span>
{%- endfor %}<span>{{ "{:,}".format(e.chars) }} characters</span></div>
</article>
{%- endmacro %}
<h1>{{ title }}</h1>
<nav><a href="#flow">Flow</a><a href="#steps">Steps</a><a href="#texts">Texts</a>
{%- if pairs %}<a href="#copies">Copies</a>{% endif %}
{%- if dropped %}<a href="#dropped">Dropped</a>{% endif %}
{%- if kept %}<a href="#kept">Kept</a>{% endif %}<a href="#settings">Settings</a></nav>
{% if unfinished %}
<article class="warning">Cleaning goes on; the counts are of the tasks that are done:
{%- for line in unfinished %} {{ line }}{{ "," if not loop.last else "." }}{% endfor %}</article>
{% endif %}
{% if faults %}
<article class="warning"><strong>Does not add up</strong>
{%- for line in faults %}
<div>{{ line }}</div>
{%- endfor %}
</article>
{% elif steps %}
<p class="note">Of every step, documents in are those kept and dropped, and documents and bytes out are those into the
next: checked in every task{{ "" if unfinished else ", and from phase to phase" }}.</p>
{% endif %}
<h2 id="flow">Flow</h2>
{%- if "documents" in images %}{{ picture("documents", "documents from inputs through steps") }}{% endif %}
{%- if "bytes" in images %}{{ picture("bytes", "bytes from inputs through steps") }}
<p class="note">Of bytes also what a step removes inside documents is drawn as dropped, such as the markup of
pages.</p>{% endif %}
{%- if totals %}{{ table(totals) }}{% endif %}
<h2 id="steps">Steps</h2>
{%- if steps %}{{ table(steps, "wide") }}
<p class="note">Seconds are those spent in the step by the clock, over all tasks; MB/s is what came in, per such
second.</p>{% else %}<p>No task is done yet.</p>{% endif %}
{%- for title, rows in tables.items() %}
<h3>{{ title }}</h3>
{{- table(rows) }}
{%- endfor %}
<h2 id="texts">Texts</h2>
{%- for line in scopes %}<p class="note">{{ line }}</p>{% endfor %}
{%- if "lengths" in images %}{{ picture("lengths", "lengths of documents") }}{% endif %}
{%- if "languages" in images %}{{ picture("languages", "languages of documents") }}{% endif %}
{%- if "curve" in images %}
<h3>Near duplicates</h3>
{{- picture("curve", "probability that near duplicates are found") }}{% endif %}
{% if pairs %}
<h2 id="copies">Copies</h2>
{%- for copy, original in pairs %}
<h3>A copy, and what stays</h3>
{{- example(copy) }}
{%- if original %}{{ example(original) }}{% else %}
<p class="note">What stays is not among the documents that were looked at.</p>{% endif %}
{%- endfor %}
{% endif %}
{% if dropped %}
<h2 id="dropped">Dropped</h2>
{%- for (step, reason), examples in dropped.items() %}
<details><summary>{{ step }}: {{ reason }}</summary>
{%- for e in examples %}{{ example(e) }}{% endfor %}
</details>
{%- endfor %}
{% endif %}
{% if kept %}
<h2 id="kept">Kept</h2>
{%- for name, examples in kept.items() %}
<details><summary>{{ name }}</summary>
{%- for e in examples %}{{ example(e) }}{% endfor %}
</details>
{%- endfor %}
{% endif %}
<h2 id="settings">Settings</h2>
<details><summary>data.clean</summary><pre>{{ settings }}</pre></details>
<details><summary>data.collect</summary><pre>{{ inputs }}</pre></details>
</body>
</html>
"""
)
