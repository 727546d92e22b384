"""Run by Alembic for every command: binds the migrations to a connection, or to a script.

The connection and its open transaction belong to `orbit.database.upgrade`, which holds the
lock and decides on commit. Without a connection the SQL is written out for a person to run,
with the same lock and the same bound on waiting. Nothing is compared or generated here.
"""

from __future__ import annotations

from alembic import context

connection = context.config.attributes.get("connection")
if connection is None:
    context.configure(dialect_name="postgresql", transactional_ddl=True)
else:
    context.configure(connection=connection, transactional_ddl=True)

with context.begin_transaction():
    if connection is None:
        for statement in context.config.attributes["preamble"]:
            context.get_context().impl.static_output(statement)
    context.run_migrations()
