-- The library looks at every utility statement of the cluster (it hooks ProcessUtility): their errors must come through
-- as if it were not there. When this file kills the server, the hook lets an error out the wrong way.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

CREATE TEMP TABLE numbers (n integer);
INSERT INTO numbers VALUES (1), (1);
-- All that a client can read of an error.
CREATE FUNCTION pg_temp.error_of(statement text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    state text; message text; detail text; hint text; context text; named text; of_table text;
BEGIN
    EXECUTE statement;
    RETURN 'no error';
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT,
        context = PG_EXCEPTION_CONTEXT, named = CONSTRAINT_NAME, of_table = TABLE_NAME;
    RETURN concat_ws(' | ', state || ': ' || message, nullif(detail, ''), nullif(hint, ''), nullif(named, ''), nullif(of_table, ''), split_part(context, E'\n', 1));
END
$$;

SELECT is(pg_temp.error_of('TRUNCATE nowhere'),
          '42P01: relation "nowhere" does not exist | SQL statement "TRUNCATE nowhere"', 'a utility statement that fails raises its error');
SELECT is(pg_temp.error_of('CREATE UNIQUE INDEX numbers_once ON numbers (n)'),
          '23505: could not create unique index "numbers_once" | Key (n)=(1) is duplicated. | numbers_once | numbers | SQL statement "CREATE UNIQUE INDEX numbers_once ON numbers (n)"',
          'with the detail, the constraint and the table');
SELECT is(pg_temp.error_of('DO ''BEGIN PERFORM 1 / 0; END'''),
          '22012: division by zero | SQL statement "SELECT 1 / 0"', 'with the context of a DO block');
SELECT is(pg_temp.error_of('SET work_mem = ''lots'''),
          '22023: invalid value for parameter "work_mem": "lots" | SQL statement "SET work_mem = ''lots''"', 'of SET');
SELECT is(pg_temp.error_of('DROP EXTENSION nowhere'), '42704: extension "nowhere" does not exist | SQL statement "DROP EXTENSION nowhere"', 'of DROP EXTENSION');
SELECT is(pg_temp.error_of('ALTER TABLE numbers ADD CHECK (n > 1)'),
          '23514: check constraint "numbers_n_check" of relation "numbers" is violated by some row | numbers_n_check | numbers | SQL statement "ALTER TABLE numbers ADD CHECK (n > 1)"',
          'of ALTER TABLE');
SELECT is((SELECT count(*) FROM generate_series(1, 200) WHERE pg_temp.error_of('TRUNCATE nowhere') LIKE '42P01%'), 200::bigint, 'and again and again');

SELECT * FROM finish();
ROLLBACK;
