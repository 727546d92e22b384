"""The newsroom's steps: articles in, posts for several platforms out.

Tier 1 `desk:select` picks articles, tier 2 `brief:write` shortens them and the HTTP step
`enrich` adds to them, tier 3 `posts:compose` writes the posts, `items` makes them one item
each. All of it is plain text work and deterministic: the same payload and context give the
same bytes, so that a step which is called twice after a crash does no harm.
"""
