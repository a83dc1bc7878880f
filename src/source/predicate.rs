//! The `where` of a source table: which rows take part in a run.
//!
//! A [`Predicate`] is one SQL condition over the columns of the table. It is parsed once, checked
//! against the schema before the first row is read, used to skip whole files
//! ([`Predicate::partition_may_match`]) and Parquet row groups ([`Predicate::may_match`]), and
//! evaluated on every `RecordBatch` that remains ([`Predicate::evaluate`]). Skipping is an economy
//! only: it never changes which rows are kept.
//!
//! # Language
//! - Columns, bare or `"quoted"`, matched with their exact case. A BOOLEAN column alone is a
//!   condition.
//! - Literals: numbers, `'text'`, `TRUE`, `FALSE`, `NULL`, `DATE '2026-11-22'`, `TIMESTAMP
//!   '2026-11-22 08:30:00'`.
//! - `=` `<>` `!=` `<` `<=` `>` `>=` between a column and a literal or a second column, `[NOT] IN
//!   (literals)`, `[NOT] BETWEEN`, `[NOT] LIKE 'pattern'` (`%`, `_`, and `\` to escape them), `IS
//!   [NOT] NULL`, `AND`, `OR`, `NOT`.
//!
//! # What a comparison means
//! The literal takes the type of the column: `0.1` equals a Float32 `0.1`. Integers compare
//! exactly, whatever their width; an integer column against a fraction, and a DECIMAL with a scale,
//! compare as Float64. Text next to a date or a timestamp is read as one. A timestamp without an
//! offset is UTC, a date is its midnight, and all time units compare exactly. Logic is
//! three-valued, and **a NaN compares as NULL does**: with nothing, not even by `<>`. So rows whose
//! measure could not be computed are never kept by a comparison, and Parquet statistics, which
//! leave NaN out, can be trusted.
//!
//! # What this is not
//! A query engine: there are no functions, arithmetic or subqueries. They are refused with the text
//! of the offending part.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Datum, Decimal128Array, Float64Array, RecordBatch, Scalar, StringArray,
    StringViewArray, new_null_array,
};
use arrow::buffer::BooleanBuffer;
use arrow::compute::kernels::cast_utils::string_to_datetime;
use arrow::compute::kernels::cmp;
use arrow::compute::{CastOptions, and_kleene, cast_with_options, is_null, like, not, nullif, or_kleene};
use arrow::datatypes::{DataType, Decimal128Type, Float64Type, Int64Type, Schema, SchemaRef, TimeUnit};
use arrow::error::ArrowError;
use chrono::{DateTime, SecondsFormat, Utc};
use parquet::arrow::arrow_reader::statistics::StatisticsConverter;
use parquet::errors::ParquetError;
use parquet::file::metadata::ParquetMetaData;
use parquet::file::statistics::Statistics;
use sqlparser::ast::{BinaryOperator, DataType as SqlType, Expr as SqlExpr, InTarget, UnaryOperator, Value};
use sqlparser::dialect::GenericDialect;
use sqlparser::parser::{Parser, ParserError};
use sqlparser::tokenizer::Token;

/// Why a predicate cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PredicateError {
    /// The text holds nothing but white space.
    #[error("the predicate is empty: write a condition such as label = 'cat', or leave it out")]
    Empty,
    /// The text is not SQL.
    #[error("cannot parse the predicate `{predicate}`")]
    Syntax {
        /// The predicate as written.
        predicate: String,
        /// What the parser expected, and where.
        #[source]
        source: ParserError,
    },
    /// A complete condition is followed by more text.
    #[error("unexpected `{found}` after the end of the predicate: join conditions with AND or OR")]
    TrailingText {
        /// The first word or sign that does not belong to the condition.
        found: String,
    },
    /// A part is SQL, but not of the supported language.
    #[error(
        "`{part}` is not supported here: a predicate compares a column with a literal or with another column \
         (=, <>, <, <=, >, >=, [NOT] IN, BETWEEN, LIKE, IS [NOT] NULL) and joins conditions with AND, OR, NOT"
    )]
    Unsupported {
        /// The offending part, as the parser understood it.
        part: String,
    },
    /// A text is compared with a date or timestamp column, or follows `DATE` or `TIMESTAMP`, but is
    /// neither.
    #[error(
        "'{text}' is not a point in time: write '2026-11-22' or '2026-11-22 08:30:00', with Z or +02:00 if not UTC"
    )]
    InvalidTime {
        /// The text as written.
        text: String,
        /// Where reading it failed.
        #[source]
        source: ArrowError,
    },
    /// The table has no such column.
    #[error("the table has no column `{column}`; {hint}")]
    UnknownColumn {
        /// The name as written in the predicate.
        column: String,
        /// The nearest name, or all names.
        hint: String,
    },
    /// The two sides of a comparison have types that do not fit.
    #[error("cannot compare column `{column}`, which is {data_type}, with {other}")]
    TypeMismatch {
        /// The column on the left.
        column: String,
        /// Its Arrow type.
        data_type: DataType,
        /// The literal, or the other column and its type.
        other: String,
    },
    /// `LIKE` is asked of a column that holds no text.
    #[error("column `{column}` is {data_type}: LIKE matches text columns only")]
    NotText {
        /// The column.
        column: String,
        /// Its Arrow type.
        data_type: DataType,
    },
    /// An Arrow kernel failed on values of the right type, such as a DECIMAL beyond 38 digits.
    #[error("cannot evaluate the predicate")]
    Evaluate(#[from] ArrowError),
    /// The statistics of a Parquet file cannot be read.
    #[error("cannot read the Parquet statistics of column `{column}`")]
    Statistics {
        /// The column.
        column: String,
        /// Why.
        #[source]
        source: ParquetError,
    },
}

/// A condition on the rows of a table.
///
/// Its [`Display`](fmt::Display) text is canonical: predicates that differ only in white space, in
/// the case of keywords, in needless quotes or parentheses, or in `IN` and `BETWEEN` instead of the
/// comparisons they stand for, print the same. The text parses back to the same predicate.
#[derive(Debug, Clone, PartialEq)]
pub struct Predicate {
    condition: Condition,
    columns: BTreeSet<String>,
}

impl Predicate {
    /// Reads one condition. Columns and types are not known here; [`Predicate::check`] looks at
    /// them.
    pub fn parse(sql: &str) -> Result<Self, PredicateError> {
        if sql.trim().is_empty() {
            return Err(PredicateError::Empty);
        }
        let syntax = |source| PredicateError::Syntax { predicate: sql.to_owned(), source };
        let mut parser = Parser::new(&GenericDialect {}).try_with_sql(sql).map_err(syntax)?;
        let expr = parser.parse_expr().map_err(syntax)?;
        let next = parser.peek_token();
        if next.token != Token::EOF {
            return Err(PredicateError::TrailingText { found: next.to_string() });
        }
        let condition = Condition::from_sql(&expr)?;
        let mut columns = BTreeSet::new();
        condition.collect_columns(&mut columns);
        Ok(Self { condition, columns })
    }

    /// The columns that [`Predicate::evaluate`] needs, sorted.
    pub fn columns(&self) -> &BTreeSet<String> {
        &self.columns
    }

    /// Checks that every column exists and that every comparison's types fit, so that
    /// [`Predicate::evaluate`] cannot fail for these reasons on batches of this schema.
    pub fn check(&self, schema: &Schema) -> Result<(), PredicateError> {
        // The types are checked where they are used; a batch without rows takes the same path.
        let no_rows = RecordBatch::new_empty(SchemaRef::new(schema.clone()));
        self.evaluate(&no_rows).map(|_| ())
    }

    /// One value a row of `batch`: true, false, or NULL for unknown. Keep the rows where it is
    /// true.
    ///
    /// # Errors
    /// As [`Predicate::check`], and [`PredicateError::Evaluate`] when a value has no exact form to
    /// compare in.
    pub fn evaluate(&self, batch: &RecordBatch) -> Result<BooleanArray, PredicateError> {
        self.condition.evaluate(batch)
    }

    /// Whether each row group of a Parquet file may hold a row to keep, in the order of the file.
    /// `false` only where the statistics prove that it holds none; a missing statistic proves
    /// nothing.
    ///
    /// `file_schema` is the Arrow schema that the Parquet reader gives the columns of this file:
    /// the statistics are read as these types. Columns of the predicate that it lacks may have any
    /// value.
    pub fn may_match(&self, metadata: &ParquetMetaData, file_schema: &Schema) -> Result<Vec<bool>, PredicateError> {
        let mut bounds = BTreeMap::new();
        for column in &self.columns {
            let of_column = Bounds::of_row_groups(column, metadata, file_schema)
                .map_err(|source| PredicateError::Statistics { column: column.clone(), source })?;
            if let Some(of_column) = of_column {
                bounds.insert(column.as_str(), of_column);
            }
        }
        let outcomes = self.condition.outcomes(metadata.num_row_groups(), &bounds)?;
        Ok(outcomes.can_be_true.iter().collect())
    }

    /// Whether a file may hold a row to keep, given the text (`None`: NULL) that some columns have
    /// in all its rows, as in the hive folder `ds=2026-11-22`. Columns that are not given may have
    /// any value.
    pub fn partition_may_match(&self, values: &BTreeMap<String, Option<String>>) -> Result<bool, PredicateError> {
        let bounds =
            values.iter().map(|(column, value)| (column.as_str(), Bounds::of_constant(value.as_deref()))).collect();
        Ok(self.condition.outcomes(1, &bounds)?.can_be_true.value(0))
    }
}

impl fmt::Display for Predicate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.condition.fmt(f)
    }
}

/// The predicate as resolved: `IN` and `BETWEEN` are the comparisons that the SQL standard defines
/// them by, a column is on the left, `AND` and `OR` do not hold themselves.
#[derive(Debug, Clone, PartialEq)]
enum Condition {
    Constant(Option<bool>),
    Compare { column: String, comparison: Comparison, other: Operand },
    Like { column: String, pattern: String },
    IsNull(String),
    Not(Box<Self>),
    And(Vec<Self>),
    Or(Vec<Self>),
}

#[derive(Debug, Clone, PartialEq)]
enum Operand {
    Column(String),
    Literal(Literal),
}

#[derive(Debug, Clone, PartialEq)]
enum Literal {
    Null,
    Boolean(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    Time(DateTime<Utc>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Eq,
    NotEq,
    Lt,
    LtEq,
    Gt,
    GtEq,
}

// Parsing: from the parser's syntax tree to a condition.

impl Condition {
    #[expect(clippy::wildcard_enum_match_arm, reason = "all SQL that is not listed is refused")]
    fn from_sql(expr: &SqlExpr) -> Result<Self, PredicateError> {
        let negated_if = |negated: bool, condition| {
            if negated { Self::Not(Box::new(condition)) } else { condition }
        };
        match expr {
            SqlExpr::Nested(inner) => Self::from_sql(inner),
            SqlExpr::UnaryOp { op: UnaryOperator::Not, expr } => Ok(Self::Not(Box::new(Self::from_sql(expr)?))),
            SqlExpr::BinaryOp { op, .. } if matches!(op, BinaryOperator::And | BinaryOperator::Or) => {
                let conditions = chain(expr, op).into_iter().map(Self::from_sql);
                let conditions = conditions.collect::<Result<_, _>>()?;
                Ok(if *op == BinaryOperator::And { Self::all_of(conditions) } else { Self::any_of(conditions) })
            }
            SqlExpr::BinaryOp { left, op, right } => {
                let comparison = Comparison::from_sql(op).ok_or_else(|| unsupported(expr))?;
                match (Operand::from_sql(left)?, Operand::from_sql(right)?) {
                    (Operand::Column(column), other) => Ok(Self::compare(&column, comparison, other)),
                    (literal, Operand::Column(column)) => Ok(Self::compare(&column, comparison.flipped(), literal)),
                    (Operand::Literal(_), Operand::Literal(_)) => Err(unsupported(expr)),
                }
            }
            SqlExpr::In { expr: tested, target: InTarget::List(list), negated, global: false } if !list.is_empty() => {
                let column = column_name(tested)?;
                let one_of =
                    list.iter().map(|literal| Ok(Self::compare(&column, Comparison::Eq, Operand::from_sql(literal)?)));
                let one_of = one_of.collect::<Result<_, PredicateError>>()?;
                Ok(negated_if(*negated, Self::any_of(one_of)))
            }
            SqlExpr::Between { expr: tested, negated, low, high } => {
                let column = column_name(tested)?;
                let within = Self::all_of(vec![
                    Self::compare(&column, Comparison::GtEq, Operand::from_sql(low)?),
                    Self::compare(&column, Comparison::LtEq, Operand::from_sql(high)?),
                ]);
                Ok(negated_if(*negated, within))
            }
            SqlExpr::Like { negated, any: false, expr: tested, pattern, escape_char: None } => {
                let Operand::Literal(Literal::Text(pattern)) = Operand::from_sql(pattern)? else {
                    return Err(unsupported(expr));
                };
                let column = column_name(tested)?;
                Ok(negated_if(*negated, Self::Like { column, pattern }))
            }
            SqlExpr::IsNull(tested) => Ok(Self::IsNull(column_name(tested)?)),
            SqlExpr::IsNotNull(tested) => Ok(Self::Not(Box::new(Self::IsNull(column_name(tested)?)))),
            SqlExpr::Identifier(_) => {
                let is_true = Operand::Literal(Literal::Boolean(true));
                Ok(Self::compare(&column_name(expr)?, Comparison::Eq, is_true))
            }
            SqlExpr::Value(_) => match Operand::from_sql(expr)? {
                Operand::Literal(Literal::Boolean(value)) => Ok(Self::Constant(Some(value))),
                Operand::Literal(Literal::Null) => Ok(Self::Constant(None)),
                _ => Err(unsupported(expr)),
            },
            _ => Err(unsupported(expr)),
        }
    }

    fn compare(column: &str, comparison: Comparison, other: Operand) -> Self {
        Self::Compare { column: column.to_owned(), comparison, other }
    }

    fn all_of(conditions: Vec<Self>) -> Self {
        let mut terms = Vec::with_capacity(conditions.len());
        for condition in conditions {
            if let Self::And(inner) = condition {
                terms.extend(inner);
            } else {
                terms.push(condition);
            }
        }
        Self::And(terms)
    }

    /// A single alternative, as of `IN (1)`, is itself.
    fn any_of(mut conditions: Vec<Self>) -> Self {
        if conditions.len() == 1 {
            return conditions.remove(0);
        }
        let mut terms = Vec::with_capacity(conditions.len());
        for condition in conditions {
            if let Self::Or(inner) = condition {
                terms.extend(inner);
            } else {
                terms.push(condition);
            }
        }
        Self::Or(terms)
    }

    fn collect_columns(&self, columns: &mut BTreeSet<String>) {
        match self {
            Self::Constant(_) => {}
            Self::Compare { column, other, .. } => {
                columns.insert(column.clone());
                if let Operand::Column(other) = other {
                    columns.insert(other.clone());
                }
            }
            Self::Like { column, .. } | Self::IsNull(column) => {
                columns.insert(column.clone());
            }
            Self::Not(inner) => inner.collect_columns(columns),
            Self::And(inner) | Self::Or(inner) => {
                for each in inner {
                    each.collect_columns(columns);
                }
            }
        }
    }
}

impl Operand {
    #[expect(clippy::wildcard_enum_match_arm, reason = "all SQL that is not listed is refused")]
    fn from_sql(expr: &SqlExpr) -> Result<Self, PredicateError> {
        let literal = match expr {
            SqlExpr::Nested(inner) => return Self::from_sql(inner),
            SqlExpr::Identifier(name) => return Ok(Self::Column(name.value.clone())),
            SqlExpr::UnaryOp { op: UnaryOperator::Minus, expr: inner } => match Self::from_sql(inner)? {
                Self::Literal(Literal::Integer(value)) => Literal::Integer(-value),
                Self::Literal(Literal::Float(value)) => Literal::Float(-value),
                _ => return Err(unsupported(expr)),
            },
            SqlExpr::TypedString(typed) => {
                let Value::SingleQuotedString(text) = &typed.value.value else {
                    return Err(unsupported(expr));
                };
                match typed.data_type {
                    SqlType::Date => Literal::Time(parse_date(text)?),
                    SqlType::Timestamp(..) => Literal::Time(parse_time(text)?),
                    _ => return Err(unsupported(expr)),
                }
            }
            SqlExpr::Value(value) => match &value.value {
                Value::Number(digits, _) => number(digits).ok_or_else(|| unsupported(expr))?,
                Value::SingleQuotedString(text) => Literal::Text(text.clone()),
                Value::Boolean(value) => Literal::Boolean(*value),
                Value::Null => Literal::Null,
                _ => return Err(unsupported(expr)),
            },
            _ => return Err(unsupported(expr)),
        };
        Ok(Self::Literal(literal))
    }
}

fn unsupported(expr: &SqlExpr) -> PredicateError {
    PredicateError::Unsupported { part: expr.to_string() }
}

/// The operands of `a AND b AND c` in order. The parser nests them to the left, once for each
/// operand, so a generated predicate of many thousand would exhaust the stack of a recursive walk.
fn chain<'a>(mut expr: &'a SqlExpr, operator: &BinaryOperator) -> Vec<&'a SqlExpr> {
    let mut operands = Vec::new();
    while let SqlExpr::BinaryOp { left, op, right } = expr
        && op == operator
    {
        operands.push(right.as_ref());
        expr = left;
    }
    operands.push(expr);
    operands.reverse();
    operands
}

fn column_name(expr: &SqlExpr) -> Result<String, PredicateError> {
    match Operand::from_sql(expr)? {
        Operand::Column(name) => Ok(name),
        Operand::Literal(_) => Err(unsupported(expr)),
    }
}

fn number(digits: &str) -> Option<Literal> {
    if let Ok(value) = digits.parse() {
        return Some(Literal::Integer(value));
    }
    let value: f64 = digits.parse().ok()?;
    value.is_finite().then_some(Literal::Float(value))
}

fn parse_time(text: &str) -> Result<DateTime<Utc>, PredicateError> {
    parse_time_as(text, text)
}

/// Refuses a time of day: who writes `DATE` does not expect one.
fn parse_date(text: &str) -> Result<DateTime<Utc>, PredicateError> {
    parse_time_as(text, &format!("{text} 00:00:00"))
}

/// Parses `completed`; an error shows the `text` as written.
fn parse_time_as(text: &str, completed: &str) -> Result<DateTime<Utc>, PredicateError> {
    string_to_datetime(&Utc, completed).map_err(|source| PredicateError::InvalidTime { text: text.to_owned(), source })
}

impl Comparison {
    fn from_sql(operator: &BinaryOperator) -> Option<Self> {
        const OPERATORS: [(BinaryOperator, Comparison); 6] = [
            (BinaryOperator::Eq, Comparison::Eq),
            (BinaryOperator::NotEq, Comparison::NotEq),
            (BinaryOperator::Lt, Comparison::Lt),
            (BinaryOperator::LtEq, Comparison::LtEq),
            (BinaryOperator::Gt, Comparison::Gt),
            (BinaryOperator::GtEq, Comparison::GtEq),
        ];
        let found = OPERATORS.iter().find(|(sql, _)| sql == operator);
        found.map(|(_, comparison)| *comparison)
    }

    /// `b > a` for `a < b`.
    fn flipped(self) -> Self {
        match self {
            Self::Eq | Self::NotEq => self,
            Self::Lt => Self::Gt,
            Self::LtEq => Self::GtEq,
            Self::Gt => Self::Lt,
            Self::GtEq => Self::LtEq,
        }
    }

    /// The comparison that is true where this one is false.
    fn negated(self) -> Self {
        match self {
            Self::Eq => Self::NotEq,
            Self::NotEq => Self::Eq,
            Self::Lt => Self::GtEq,
            Self::LtEq => Self::Gt,
            Self::Gt => Self::LtEq,
            Self::GtEq => Self::Lt,
        }
    }

    fn apply(self, left: &dyn Datum, right: &dyn Datum) -> Result<BooleanArray, ArrowError> {
        match self {
            Self::Eq => cmp::eq(left, right),
            Self::NotEq => cmp::neq(left, right),
            Self::Lt => cmp::lt(left, right),
            Self::LtEq => cmp::lt_eq(left, right),
            Self::Gt => cmp::gt(left, right),
            Self::GtEq => cmp::gt_eq(left, right),
        }
    }
}

// The canonical text.

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Constant(value) => value.map_or(Literal::Null, Literal::Boolean).fmt(f),
            Self::Compare { column, comparison, other } => write!(f, "{} {comparison} {other}", quoted(column, '"')),
            Self::Like { column, pattern } => {
                write!(f, "{} LIKE {}", quoted(column, '"'), quoted(pattern, '\''))
            }
            Self::IsNull(column) => write!(f, "{} IS NULL", quoted(column, '"')),
            Self::Not(inner) => write!(f, "NOT ({inner})"),
            Self::And(inner) => write_joined(f, inner, " AND "),
            Self::Or(inner) => write_joined(f, inner, " OR "),
        }
    }
}

fn write_joined(f: &mut fmt::Formatter<'_>, conditions: &[Condition], separator: &str) -> fmt::Result {
    for (position, condition) in conditions.iter().enumerate() {
        if position > 0 {
            f.write_str(separator)?;
        }
        if matches!(condition, Condition::And(_) | Condition::Or(_)) {
            write!(f, "({condition})")?;
        } else {
            write!(f, "{condition}")?;
        }
    }
    Ok(())
}

impl fmt::Display for Operand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Column(name) => f.write_str(&quoted(name, '"')),
            Self::Literal(literal) => literal.fmt(f),
        }
    }
}

impl fmt::Display for Literal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("NULL"),
            Self::Boolean(true) => f.write_str("TRUE"),
            Self::Boolean(false) => f.write_str("FALSE"),
            Self::Integer(value) => value.fmt(f),
            // Debug keeps the point or the exponent, so that it parses back to a float.
            Self::Float(value) => write!(f, "{value:?}"),
            Self::Text(text) => f.write_str(&quoted(text, '\'')),
            Self::Time(time) => {
                let text = time.to_rfc3339_opts(SecondsFormat::AutoSi, true);
                write!(f, "TIMESTAMP '{text}'")
            }
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eq => "=",
            Self::NotEq => "<>",
            Self::Lt => "<",
            Self::LtEq => "<=",
            Self::Gt => ">",
            Self::GtEq => ">=",
        })
    }
}

/// A column name or a text between quotation marks, those within doubled.
fn quoted(text: &str, mark: char) -> String {
    let within = text.replace(mark, &format!("{mark}{mark}"));
    format!("{mark}{within}{mark}")
}

// Types: both sides of a comparison are brought into one of a few common types.

/// Where values are compared. The many Arrow types of a column and the few of a literal meet in one
/// of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Domain {
    /// As Boolean: false < true.
    Boolean,
    /// As Decimal128 without fraction, which holds every Arrow integer exactly.
    Integer,
    /// As Float64, with literals rounded to Float32 first: the values of a Float32 or Float16
    /// column.
    Single,
    /// As Float64.
    Double,
    /// As `Utf8View`, in the order of the bytes.
    Text,
    /// As Decimal128: nanoseconds since 1970 in UTC, beyond the years that an i64 of them can
    /// reach.
    Time,
}

impl Domain {
    /// `None` for types that only `IS NULL` can look at.
    #[expect(clippy::wildcard_enum_match_arm, reason = "a type that is not listed has no comparisons")]
    fn of_column(data_type: &DataType) -> Option<Self> {
        match data_type {
            DataType::Boolean => Some(Self::Boolean),
            DataType::Decimal32(_, 0) | DataType::Decimal64(_, 0) | DataType::Decimal128(_, 0) => Some(Self::Integer),
            integer if integer.is_integer() => Some(Self::Integer),
            DataType::Float16 | DataType::Float32 => Some(Self::Single),
            double if double.is_floating() || double.is_decimal() => Some(Self::Double),
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Some(Self::Text),
            DataType::Date32 | DataType::Date64 | DataType::Timestamp(..) => Some(Self::Time),
            DataType::Dictionary(_, values) => Self::of_column(values),
            _ => None,
        }
    }

    /// Where values of this domain meet a literal.
    fn with_literal(self, literal: &Literal) -> Option<Self> {
        match (self, literal) {
            (_, Literal::Null)
            | (Self::Boolean, Literal::Boolean(_))
            | (Self::Integer, Literal::Integer(_))
            | (Self::Double, Literal::Integer(_) | Literal::Float(_))
            | (Self::Text, Literal::Text(_))
            | (Self::Time, Literal::Time(_) | Literal::Text(_)) => Some(self),
            (Self::Integer, Literal::Float(_)) => Some(Self::Double),
            (Self::Single, Literal::Integer(_)) => Some(Self::Single),
            // Beyond the range of Float32 rounding would give infinity, which is a value of its
            // own.
            (Self::Single, Literal::Float(value)) => {
                let fits = value.abs() <= f64::from(f32::MAX);
                Some(if fits { Self::Single } else { Self::Double })
            }
            _ => None,
        }
    }

    /// Where values of this domain meet those of a second column.
    fn with_column(self, other: Self) -> Option<Self> {
        let is_number = |domain| matches!(domain, Self::Integer | Self::Single | Self::Double);
        if self == other { Some(self) } else { (is_number(self) && is_number(other)).then_some(Self::Double) }
    }

    fn data_type(self) -> DataType {
        match self {
            Self::Boolean => DataType::Boolean,
            Self::Integer | Self::Time => WHOLE,
            Self::Single | Self::Double => DataType::Float64,
            Self::Text => DataType::Utf8View,
        }
    }

    /// The values of a column in this domain. A NaN becomes NULL and -0.0 becomes 0.0, since the
    /// kernels order floats by IEEE 754 `totalOrder`, where both are values of their own.
    fn values(self, array: &dyn Array) -> Result<ArrayRef, ArrowError> {
        // A value that does not fit must be an error: as NULL it would be dropped in silence.
        let options = CastOptions { safe: false, ..CastOptions::default() };
        let cast = |to| cast_with_options(array, to, &options);
        match self {
            Self::Boolean | Self::Integer | Self::Text => cast(&self.data_type()),
            Self::Single | Self::Double => {
                let floats = cast(&DataType::Float64)?;
                let floats = floats.as_primitive::<Float64Type>();
                let ordered = floats.unary_opt::<_, Float64Type>(|value| (!value.is_nan()).then_some(value + 0.0));
                Ok(Arc::new(ordered))
            }
            Self::Time => {
                let unit = nanoseconds_per_unit(array.data_type());
                let counts = cast(&DataType::Int64)?;
                let counts = counts.as_primitive::<Int64Type>();
                let nanoseconds = counts.unary::<_, Decimal128Type>(|count| i128::from(count) * unit);
                Ok(Arc::new(nanoseconds.with_data_type(WHOLE)))
            }
        }
    }

    /// A literal in this domain, which [`Domain::with_literal`] has found for it.
    #[expect(clippy::cast_possible_truncation, reason = "rounding to Float32 is what Single is for")]
    fn literal(self, literal: &Literal) -> Result<Scalar<ArrayRef>, PredicateError> {
        let whole = |value| Decimal128Array::from(vec![value]).with_data_type(WHOLE);
        let float = |value: f64| Float64Array::from(vec![value + 0.0]);
        let single = self == Self::Single;
        let array: ArrayRef = match literal {
            Literal::Null => new_null_array(&self.data_type(), 1),
            Literal::Boolean(value) => Arc::new(BooleanArray::from(vec![*value])),
            Literal::Integer(value) if self == Self::Integer => Arc::new(whole(*value)),
            Literal::Integer(value) if single => Arc::new(float(f64::from(*value as f32))),
            Literal::Integer(value) => Arc::new(float(*value as f64)),
            Literal::Float(value) if single => Arc::new(float(f64::from(*value as f32))),
            Literal::Float(value) => Arc::new(float(*value)),
            Literal::Text(text) if self == Self::Time => Arc::new(whole(nanoseconds(parse_time(text)?))),
            Literal::Text(text) => Arc::new(StringViewArray::from(vec![text.as_str()])),
            Literal::Time(time) => Arc::new(whole(nanoseconds(*time))),
        };
        Ok(Scalar::new(array))
    }
}

/// Whole numbers of up to 38 digits.
const WHOLE: DataType = DataType::Decimal128(38, 0);

const NANOSECONDS_PER_SECOND: i128 = 1_000_000_000;

/// Nanoseconds since 1970 in UTC.
fn nanoseconds(time: DateTime<Utc>) -> i128 {
    i128::from(time.timestamp()) * NANOSECONDS_PER_SECOND + i128::from(time.timestamp_subsec_nanos())
}

/// What one unit of a date or timestamp column stands for.
#[expect(clippy::wildcard_enum_match_arm, reason = "the remaining types of Domain::Time count nanoseconds")]
fn nanoseconds_per_unit(data_type: &DataType) -> i128 {
    match data_type {
        DataType::Dictionary(_, values) => nanoseconds_per_unit(values),
        DataType::Date32 => 24 * 60 * 60 * NANOSECONDS_PER_SECOND,
        DataType::Timestamp(TimeUnit::Second, _) => NANOSECONDS_PER_SECOND,
        DataType::Date64 | DataType::Timestamp(TimeUnit::Millisecond, _) => 1_000_000,
        DataType::Timestamp(TimeUnit::Microsecond, _) => 1_000,
        _ => 1,
    }
}

/// The domain in which a column meets a literal, or the error that names both.
fn domain_with_literal(column: &str, data_type: &DataType, literal: &Literal) -> Result<Domain, PredicateError> {
    Domain::of_column(data_type).and_then(|domain| domain.with_literal(literal)).ok_or_else(|| {
        PredicateError::TypeMismatch {
            column: column.to_owned(),
            data_type: data_type.clone(),
            other: literal.to_string(),
        }
    })
}

/// The domain in which two columns meet, or the error that names both.
fn domain_with_column(
    (column, data_type): (&str, &DataType),
    (other, other_type): (&str, &DataType),
) -> Result<Domain, PredicateError> {
    Domain::of_column(data_type)
        .zip(Domain::of_column(other_type))
        .and_then(|(domain, other_domain)| domain.with_column(other_domain))
        .ok_or_else(|| PredicateError::TypeMismatch {
            column: column.to_owned(),
            data_type: data_type.clone(),
            other: format!("column `{other}`, which is {other_type}"),
        })
}

fn check_text(column: &str, data_type: &DataType) -> Result<(), PredicateError> {
    if Domain::of_column(data_type) == Some(Domain::Text) {
        return Ok(());
    }
    Err(PredicateError::NotText { column: column.to_owned(), data_type: data_type.clone() })
}

// Evaluation on rows.

impl Condition {
    fn evaluate(&self, batch: &RecordBatch) -> Result<BooleanArray, PredicateError> {
        let num_rows = batch.num_rows();
        match self {
            Self::Constant(None) => Ok(BooleanArray::new_null(num_rows)),
            Self::Constant(Some(value)) => Ok(BooleanArray::from(vec![*value; num_rows])),
            Self::Compare { column, comparison, other } => {
                let left = column_of(batch, column)?;
                match other {
                    Operand::Literal(literal) => {
                        let domain = domain_with_literal(column, left.data_type(), literal)?;
                        let right = domain.literal(literal)?;
                        Ok(comparison.apply(&domain.values(left)?, &right)?)
                    }
                    Operand::Column(other) => {
                        let right = column_of(batch, other)?;
                        let domain = domain_with_column((column, left.data_type()), (other, right.data_type()))?;
                        Ok(comparison.apply(&domain.values(left)?, &domain.values(right)?)?)
                    }
                }
            }
            Self::Like { column, pattern } => {
                let array = column_of(batch, column)?;
                check_text(column, array.data_type())?;
                let pattern = StringViewArray::new_scalar(pattern);
                Ok(like(&Domain::Text.values(array)?, &pattern)?)
            }
            Self::IsNull(column) => Ok(is_null(column_of(batch, column)?)?),
            Self::Not(inner) => Ok(not(&inner.evaluate(batch)?)?),
            Self::And(inner) => {
                let all = BooleanArray::from(vec![true; num_rows]);
                inner.iter().try_fold(all, |kept, each| Ok(and_kleene(&kept, &each.evaluate(batch)?)?))
            }
            Self::Or(inner) => {
                let none = BooleanArray::from(vec![false; num_rows]);
                inner.iter().try_fold(none, |kept, each| Ok(or_kleene(&kept, &each.evaluate(batch)?)?))
            }
        }
    }
}

fn column_of<'a>(batch: &'a RecordBatch, column: &str) -> Result<&'a ArrayRef, PredicateError> {
    batch.column_by_name(column).ok_or_else(|| PredicateError::UnknownColumn {
        column: column.to_owned(),
        hint: column_hint(column, batch.schema_ref()),
    })
}

/// Names at least this close, on the Jaro-Winkler scale from 0 to 1, are offered as what was meant.
const SIMILAR_NAME: f64 = 0.8;

fn column_hint(column: &str, schema: &Schema) -> String {
    let wanted = column.to_lowercase();
    let names = schema.fields().iter().map(|field| field.name().as_str());
    let nearest = names
        .clone()
        .map(|name| (strsim::jaro_winkler(&wanted, &name.to_lowercase()), name))
        .max_by(|(left, _), (right, _)| left.total_cmp(right));
    match nearest {
        Some((similarity, name)) if similarity >= SIMILAR_NAME => format!("did you mean `{name}`?"),
        _ => format!("it has {}", names.collect::<Vec<_>>().join(", ")),
    }
}

// Proof by statistics, for many row groups at once.

/// What is known of one column in each of several row groups.
#[derive(Debug)]
struct Bounds {
    /// No value is below; NULL where unknown. Not necessarily a value of the column: long texts are
    /// cut.
    min: ArrayRef,
    /// No value is above; NULL where unknown.
    max: ArrayRef,
    /// Every row is known to be NULL.
    all_null: BooleanBuffer,
    /// No row is NULL, as far as is known for certain.
    no_null: BooleanBuffer,
}

impl Bounds {
    /// `None` where the file has no statistics for such a column: it is absent, or nested.
    fn of_row_groups(
        column: &str,
        metadata: &ParquetMetaData,
        file_schema: &Schema,
    ) -> Result<Option<Self>, ParquetError> {
        if file_schema.column_with_name(column).is_none() {
            return Ok(None);
        }
        let parquet_schema = metadata.file_metadata().schema_descr();
        let converter =
            StatisticsConverter::try_new(column, file_schema, parquet_schema)?.with_missing_null_counts_as_zero(false);
        let Some(leaf) = converter.parquet_column_index() else {
            return Ok(None);
        };
        let groups = metadata.row_groups();
        // The oldest writers ordered text and unsigned numbers by signed bytes; such bounds are
        // none.
        let distrusted: BooleanArray = groups
            .iter()
            .map(|group| group.column(leaf).statistics())
            .map(|found| Some(found.is_some_and(Statistics::is_min_max_deprecated)))
            .collect();
        let null_counts = converter.row_group_null_counts(groups)?;
        let null_counts = || null_counts.iter().zip(groups);
        Ok(Some(Self {
            min: nullif(&converter.row_group_mins(groups)?, &distrusted)?,
            max: nullif(&converter.row_group_maxes(groups)?, &distrusted)?,
            all_null: null_counts().map(|(nulls, group)| nulls == u64::try_from(group.num_rows()).ok()).collect(),
            no_null: null_counts().map(|(nulls, _)| nulls == Some(0)).collect(),
        }))
    }

    fn of_constant(value: Option<&str>) -> Self {
        let array: ArrayRef = Arc::new(StringArray::from(vec![value]));
        Self {
            min: Arc::clone(&array),
            max: array,
            all_null: BooleanBuffer::from(vec![value.is_none()]),
            no_null: BooleanBuffer::from(vec![value.is_some()]),
        }
    }
}

/// Which results a condition can have in the rows of each row group. Too many may be claimed, never
/// too few. That it may be NULL is not tracked: no operator makes a NULL condition true.
struct Outcomes {
    can_be_true: BooleanBuffer,
    can_be_false: BooleanBuffer,
}

impl Outcomes {
    fn constant(num_groups: usize, can_be_true: bool, can_be_false: bool) -> Self {
        let repeated = |value| BooleanBuffer::collect_bool(num_groups, |_| value);
        Self { can_be_true: repeated(can_be_true), can_be_false: repeated(can_be_false) }
    }

    fn unknown(num_groups: usize) -> Self {
        Self::constant(num_groups, true, true)
    }

    /// The outcomes of a condition that is NULL in these rows.
    fn except_where(self, null: &BooleanBuffer) -> Self {
        Self { can_be_true: &self.can_be_true & &!null, can_be_false: &self.can_be_false & &!null }
    }
}

impl Condition {
    /// Columns without `bounds` may have any value.
    fn outcomes(&self, num_groups: usize, bounds: &BTreeMap<&str, Bounds>) -> Result<Outcomes, PredicateError> {
        match self {
            Self::Constant(value) => Ok(Outcomes::constant(num_groups, *value == Some(true), *value == Some(false))),
            Self::Compare { other: Operand::Literal(Literal::Null), .. } => {
                Ok(Outcomes::constant(num_groups, false, false))
            }
            Self::Compare { column, comparison, other } => {
                let Some(left) = bounds.get(column.as_str()) else {
                    return Ok(Outcomes::unknown(num_groups));
                };
                let outcomes = match other {
                    Operand::Literal(literal) => {
                        let domain = domain_with_literal(column, left.min.data_type(), literal)?;
                        let right = domain.literal(literal)?;
                        comparison.outcomes(domain, left, (&right, &right))?
                    }
                    Operand::Column(other) => {
                        let Some(right) = bounds.get(other.as_str()) else {
                            return Ok(Outcomes::unknown(num_groups).except_where(&left.all_null));
                        };
                        let domain =
                            domain_with_column((column, left.min.data_type()), (other, right.min.data_type()))?;
                        let min = domain.values(&right.min)?;
                        let max = domain.values(&right.max)?;
                        comparison.outcomes(domain, left, (&min, &max))?.except_where(&right.all_null)
                    }
                };
                Ok(outcomes.except_where(&left.all_null))
            }
            Self::Like { column, pattern } => {
                let Some(found) = bounds.get(column.as_str()) else {
                    return Ok(Outcomes::unknown(num_groups));
                };
                check_text(column, found.min.data_type())?;
                let outcomes = Outcomes {
                    can_be_true: may_start_with(literal_prefix(pattern), found)?,
                    can_be_false: BooleanBuffer::new_set(num_groups),
                };
                Ok(outcomes.except_where(&found.all_null))
            }
            Self::IsNull(column) => Ok(bounds.get(column.as_str()).map_or(Outcomes::unknown(num_groups), |found| {
                Outcomes { can_be_true: !&found.no_null, can_be_false: !&found.all_null }
            })),
            Self::Not(inner) => {
                let inner = inner.outcomes(num_groups, bounds)?;
                Ok(Outcomes { can_be_true: inner.can_be_false, can_be_false: inner.can_be_true })
            }
            Self::And(inner) => {
                let all = Outcomes::constant(num_groups, true, false);
                inner.iter().try_fold(all, |so_far, each| {
                    let each = each.outcomes(num_groups, bounds)?;
                    Ok(Outcomes {
                        can_be_true: &so_far.can_be_true & &each.can_be_true,
                        can_be_false: &so_far.can_be_false | &each.can_be_false,
                    })
                })
            }
            Self::Or(inner) => {
                let none = Outcomes::constant(num_groups, false, true);
                inner.iter().try_fold(none, |so_far, each| {
                    let each = each.outcomes(num_groups, bounds)?;
                    Ok(Outcomes {
                        can_be_true: &so_far.can_be_true | &each.can_be_true,
                        can_be_false: &so_far.can_be_false & &each.can_be_false,
                    })
                })
            }
        }
    }
}

impl Comparison {
    fn outcomes(self, domain: Domain, left: &Bounds, right: (&dyn Datum, &dyn Datum)) -> Result<Outcomes, ArrowError> {
        let min = domain.values(&left.min)?;
        let max = domain.values(&left.max)?;
        Ok(Outcomes {
            can_be_true: self.can_hold((&min, &max), right)?,
            can_be_false: self.negated().can_hold((&min, &max), right)?,
        })
    }

    /// Whether it holds for some pair of values, each between its own (min, max).
    fn can_hold(
        self,
        (left_min, left_max): (&dyn Datum, &dyn Datum),
        (right_min, right_max): (&dyn Datum, &dyn Datum),
    ) -> Result<BooleanBuffer, ArrowError> {
        let unless_disproved = |comparison: Self, left, right| {
            let found = comparison.apply(left, right)?;
            let holds = |group| found.is_null(group) || found.value(group);
            Ok::<_, ArrowError>(BooleanBuffer::collect_bool(found.len(), holds))
        };
        match self {
            Self::Lt | Self::LtEq => unless_disproved(self, left_min, right_max),
            Self::Gt | Self::GtEq => unless_disproved(self, left_max, right_min),
            Self::Eq => Ok(&unless_disproved(Self::LtEq, left_min, right_max)?
                & &unless_disproved(Self::GtEq, left_max, right_min)?),
            // False only where all four bounds are one value.
            Self::NotEq => {
                Ok(&unless_disproved(Self::Lt, left_min, right_max)?
                    | &unless_disproved(Self::Gt, left_max, right_min)?)
            }
        }
    }
}

/// The text before the first wildcard of a `LIKE` pattern: all that matches starts with it.
fn literal_prefix(pattern: &str) -> &str {
    pattern.split(['%', '_', '\\']).next().unwrap_or_default()
}

/// Whether a text between the bounds can start with `prefix`.
fn may_start_with(prefix: &str, bounds: &Bounds) -> Result<BooleanBuffer, ArrowError> {
    let min = Domain::Text.values(&bounds.min)?;
    let max = Domain::Text.values(&bounds.max)?;
    let pairs = min.as_string_view().iter().zip(max.as_string_view());
    Ok(pairs
        .map(|(min, max)| {
            max.is_none_or(|max| max >= prefix) && min.is_none_or(|min| min <= prefix || min.starts_with(prefix))
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{
        BinaryArray, Date32Array, DictionaryArray, Float32Array, Int8Array, Int64Array, LargeStringArray, StructArray,
        TimestampMicrosecondArray, TimestampSecondArray, UInt64Array,
    };
    use arrow::compute::cast;
    use arrow::datatypes::{Field, Int32Type};
    use bytes::Bytes;
    use parquet::arrow::ArrowWriter;
    use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
    use parquet::data_type::ByteArray;
    use parquet::file::properties::{EnabledStatistics, WriterProperties};
    use parquet::file::statistics::ValueStatistics;

    const T: Option<bool> = Some(true);
    const F: Option<bool> = Some(false);
    const U: Option<bool> = None;

    fn column(name: &str, array: impl Array + 'static) -> (String, ArrayRef) {
        (name.to_owned(), Arc::new(array))
    }

    fn batch(columns: impl IntoIterator<Item = (String, ArrayRef)>) -> RecordBatch {
        let columns = columns.into_iter().map(|(name, array)| (name, array, true));
        RecordBatch::try_from_iter_with_nullable(columns).unwrap()
    }

    fn evaluate(sql: &str, rows: &RecordBatch) -> Vec<Option<bool>> {
        let predicate = Predicate::parse(sql).unwrap();
        predicate.check(rows.schema_ref()).unwrap();
        predicate.evaluate(rows).unwrap().iter().collect()
    }

    fn numbers() -> RecordBatch {
        batch([column("n", Int64Array::from(vec![Some(1), Some(2), Some(3), None]))])
    }

    fn parse_error(sql: &str) -> PredicateError {
        Predicate::parse(sql).unwrap_err()
    }

    fn check_error(sql: &str, rows: &RecordBatch) -> String {
        let predicate = Predicate::parse(sql).unwrap();
        predicate.check(rows.schema_ref()).unwrap_err().to_string()
    }

    #[test]
    fn logic_has_the_three_values_of_sql() {
        let values = vec![T, T, T, F, F, F, U, U, U];
        let others = vec![T, F, U, T, F, U, T, F, U];
        let rows = batch([column("a", BooleanArray::from(values)), column("b", BooleanArray::from(others))]);
        assert_eq!(evaluate("a AND b", &rows), [T, F, U, F, F, F, U, F, U]);
        assert_eq!(evaluate("a OR b", &rows), [T, T, T, T, F, U, T, U, U]);
        assert_eq!(evaluate("NOT a", &rows), [F, F, F, T, T, T, U, U, U]);
        assert_eq!(evaluate("a = b", &rows), [T, F, U, F, T, U, U, U, U]);
        assert_eq!(evaluate("a IS NULL", &rows), [F, F, F, F, F, F, T, T, T]);
        assert_eq!(evaluate("a OR NULL", &rows), [T, T, T, U, U, U, U, U, U]);
        assert_eq!(evaluate("a AND FALSE", &rows), [F; 9]);
        assert_eq!(evaluate("a = NULL", &rows), [U; 9]);
    }

    #[test]
    fn every_operator_gives_what_the_standard_says() {
        let rows = numbers();
        assert_eq!(evaluate("n = 2", &rows), [F, T, F, U]);
        assert_eq!(evaluate("n <> 2", &rows), [T, F, T, U]);
        assert_eq!(evaluate("n != 2", &rows), [T, F, T, U]);
        assert_eq!(evaluate("n < 2", &rows), [T, F, F, U]);
        assert_eq!(evaluate("n <= 2", &rows), [T, T, F, U]);
        assert_eq!(evaluate("n > 2", &rows), [F, F, T, U]);
        assert_eq!(evaluate("n >= 2", &rows), [F, T, T, U]);
        assert_eq!(evaluate("2 < n", &rows), [F, F, T, U]);
        assert_eq!(evaluate("n > -2", &rows), [T, T, T, U]);
        assert_eq!(evaluate("n IS NULL", &rows), [F, F, F, T]);
        assert_eq!(evaluate("n IS NOT NULL", &rows), [T, T, T, F]);
        assert_eq!(evaluate("n IN (3, 1)", &rows), [T, F, T, U]);
        assert_eq!(evaluate("n NOT IN (3, 1)", &rows), [F, T, F, U]);
        assert_eq!(evaluate("n IN (1, NULL)", &rows), [T, U, U, U]);
        assert_eq!(evaluate("n NOT IN (1, NULL)", &rows), [F, U, U, U]);
        assert_eq!(evaluate("n BETWEEN 2 AND 3", &rows), [F, T, T, U]);
        assert_eq!(evaluate("n NOT BETWEEN 2 AND 3", &rows), [T, F, F, U]);
        assert_eq!(evaluate("NOT n = 1 AND (n = 1 OR n > 2)", &rows), [F, F, T, U]);
    }

    #[test]
    fn like_matches_wildcards_and_escapes_in_every_text_type() {
        let texts = [Some("cat"), Some("cart"), Some("c%t"), None];
        let dictionary: DictionaryArray<Int32Type> = texts.into_iter().collect();
        let rows = batch([
            column("utf8", StringArray::from(texts.to_vec())),
            column("large", LargeStringArray::from(texts.to_vec())),
            column("view", StringViewArray::from(texts.to_vec())),
            column("dictionary", dictionary),
        ]);
        for name in ["utf8", "large", "view", "dictionary"] {
            let of = |rest: &str| evaluate(&format!("{name} {rest}"), &rows);
            assert_eq!(of("LIKE 'c%t'"), [T, T, T, U], "{name}");
            assert_eq!(of("LIKE 'c_t'"), [T, F, T, U], "{name}");
            assert_eq!(of(r"LIKE 'c\%t'"), [F, F, T, U], "{name}");
            assert_eq!(of("NOT LIKE 'c_t'"), [F, T, F, U], "{name}");
            assert_eq!(of("= 'cat'"), [T, F, F, U], "{name}");
            assert_eq!(of("< 'cat'"), [F, T, T, U], "{name}");
            assert_eq!(of("= utf8"), [T, T, T, U], "{name}");
        }
    }

    #[test]
    fn a_literal_takes_the_type_of_its_column() {
        let rows = batch([
            column("small", Int8Array::from(vec![-128, 127])),
            column("huge", UInt64Array::from(vec![u64::MAX, u64::MAX - 1])),
            column("big", Int64Array::from(vec![9_007_199_254_740_993, -1])),
            column("single", Float32Array::from(vec![0.1, f32::INFINITY])),
            column("double", Float64Array::from(vec![0.1, 2.0])),
        ]);
        assert_eq!(evaluate("small < 1000", &rows), [T, T]);
        assert_eq!(evaluate("small = -128", &rows), [T, F]);
        assert_eq!(evaluate("small > 126.5", &rows), [F, T]);
        assert_eq!(evaluate("huge = 18446744073709551615", &rows), [T, F]);
        assert_eq!(evaluate("huge > -1", &rows), [T, T]);
        assert_eq!(evaluate("big = 9007199254740992", &rows), [F, F], "not through a float");
        assert_eq!(evaluate("single = 0.1", &rows), [T, F]);
        assert_eq!(evaluate("single < 1e300", &rows), [T, F]);
        assert_eq!(evaluate("double = 2", &rows), [F, T]);
        assert_eq!(evaluate("small < double", &rows), [T, F]);
        assert_eq!(evaluate("single = double", &rows), [F, F], "a Float32 0.1 is not 0.1");
    }

    #[test]
    fn decimals_compare_by_value() {
        let cents = Decimal128Array::from(vec![110, 200]);
        let ids = Decimal128Array::from(vec![9_007_199_254_740_993, 2]);
        let rows = batch([
            column("price", cents.with_precision_and_scale(10, 2).unwrap()),
            column("id", ids.with_precision_and_scale(38, 0).unwrap()),
        ]);
        assert_eq!(evaluate("price = 1.1", &rows), [T, F]);
        assert_eq!(evaluate("price >= 2", &rows), [F, T]);
        assert_eq!(evaluate("id = 9007199254740992", &rows), [F, F]);
    }

    #[test]
    fn a_nan_compares_as_null_and_zero_has_no_sign() {
        let values = vec![Some(f64::NAN), Some(-f64::NAN), Some(-0.0), Some(1.0), None];
        let rows = batch([column("x", Float64Array::from(values))]);
        assert_eq!(evaluate("x > 0.5", &rows), [U, U, F, T, U]);
        assert_eq!(evaluate("x <> 1", &rows), [U, U, T, F, U]);
        assert_eq!(evaluate("x >= 0", &rows), [U, U, T, T, U]);
        assert_eq!(evaluate("x = -0.0", &rows), [U, U, T, F, U]);
        assert_eq!(evaluate("x IS NULL", &rows), [F, F, F, F, T]);
    }

    #[test]
    fn points_in_time_compare_across_units_zones_and_far_years() {
        let noon = 1_795_348_800; // 2026-11-22 12:00:00 UTC
        let far = 253_402_300_799; // 9999-12-31 23:59:59 UTC, beyond an i64 of nanoseconds
        let seconds = TimestampSecondArray::from(vec![Some(noon), Some(far), None]);
        let micros = vec![Some(noon * 1_000_000), Some(far * 1_000_000), None];
        let zoned = TimestampMicrosecondArray::from(micros).with_timezone("+02:00");
        let days = Date32Array::from(vec![Some(20_779), Some(2_932_896), None]);
        let rows = batch([column("seconds", seconds), column("zoned", zoned), column("day", days)]);
        assert_eq!(evaluate("day = DATE '2026-11-22'", &rows), [T, F, U]);
        assert_eq!(evaluate("day = '2026-11-22'", &rows), [T, F, U]);
        assert_eq!(evaluate("day > '9999-12-30'", &rows), [F, T, U]);
        for name in ["seconds", "zoned"] {
            let of = |rest: &str| evaluate(&format!("{name} {rest}"), &rows);
            assert_eq!(of("= TIMESTAMP '2026-11-22 12:00:00'"), [T, F, U], "{name}");
            assert_eq!(of("= '2026-11-22T14:00:00+02:00'"), [T, F, U], "{name}");
            assert_eq!(of("< '2026-11-22 12:00:00.000000001'"), [T, F, U], "{name}");
            assert_eq!(of(">= DATE '2026-11-23'"), [F, T, U], "{name}");
            assert_eq!(of("> day"), [T, T, U], "{name}");
        }
        assert_eq!(evaluate("seconds = zoned", &rows), [T, T, U]);
    }

    #[test]
    fn is_null_looks_at_columns_of_any_type() {
        let bytes = BinaryArray::from_opt_vec(vec![Some(b"png".as_slice()), None]);
        let field = Arc::new(Field::new("bytes", DataType::Binary, true));
        let nested =
            StructArray::try_new(vec![field].into(), vec![Arc::new(bytes.clone())], Some(vec![false, true].into()));
        let rows = batch([column("raw", bytes), column("image", nested.unwrap())]);
        assert_eq!(evaluate("raw IS NOT NULL", &rows), [T, F]);
        assert_eq!(evaluate("image IS NOT NULL", &rows), [F, T]);
        assert!(check_error("raw = 'png'", &rows).contains("`raw`, which is Binary, with 'png'"));
    }

    #[test]
    fn an_unknown_column_is_refused_with_the_nearest_name() {
        let rows = numbers().project(&[0]).unwrap();
        let rows = batch([
            ("Label".to_owned(), Arc::clone(rows.column(0))),
            ("quality".to_owned(), Arc::clone(rows.column(0))),
        ]);
        assert_eq!(check_error("lable = 1", &rows), "the table has no column `lable`; did you mean `Label`?");
        assert_eq!(
            check_error("quality = 1 AND zzz IS NULL", &rows),
            "the table has no column `zzz`; it has Label, quality"
        );
    }

    #[test]
    fn a_comparison_of_types_that_do_not_fit_names_both_before_the_first_row() {
        let rows = batch([
            column("n", Int64Array::from(vec![1])),
            column("label", StringArray::from(vec!["a"])),
            column("day", Date32Array::from(vec![0])),
        ]);
        for (sql, expected) in [
            ("n = 'a'", "cannot compare column `n`, which is Int64, with 'a'"),
            ("label > 5", "cannot compare column `label`, which is Utf8, with 5"),
            ("label", "cannot compare column `label`, which is Utf8, with TRUE"),
            ("day = 5", "cannot compare column `day`, which is Date32, with 5"),
            ("n IN (1, 'a')", "cannot compare column `n`, which is Int64, with 'a'"),
            ("n = label", "cannot compare column `n`, which is Int64, with column `label`, which is Utf8"),
            ("n LIKE '1%'", "column `n` is Int64: LIKE matches text columns only"),
        ] {
            assert_eq!(check_error(sql, &rows), expected);
        }
        assert!(check_error("day = 'soon'", &rows).starts_with("'soon' is not a point in time"));
    }

    #[test]
    fn what_the_language_lacks_is_refused_with_its_text() {
        for (sql, part) in [
            ("n = 1 AND lower(label) = 'a'", "lower(label)"),
            ("n IN (SELECT id FROM t)", "n IN (SELECT id FROM t)"),
            ("n + 1 = 2", "n + 1"),
            ("label ILIKE 'a%'", "label ILIKE 'a%'"),
            ("label LIKE 'a!%' ESCAPE '!'", "label LIKE 'a!%' ESCAPE '!'"),
            ("t.n = 1", "t.n"),
            ("1 = 1", "1 = 1"),
            ("5", "5"),
            ("n = -label", "-label"),
            ("n = 1e999", "1e999"),
            ("CAST(n AS TEXT) = '1'", "CAST(n AS TEXT)"),
            ("(n = 1) = TRUE", "n = 1"),
        ] {
            let error = parse_error(sql);
            assert!(matches!(&error, PredicateError::Unsupported { part: found } if found == part), "{sql}: {error}");
        }
    }

    #[test]
    fn text_that_is_not_one_condition_is_refused() {
        assert!(matches!(parse_error(" \n"), PredicateError::Empty));
        assert!(matches!(parse_error("n ="), PredicateError::Syntax { .. }));
        assert!(matches!(parse_error("n = 'a"), PredicateError::Syntax { .. }));
        assert!(matches!(
            parse_error("DATE '22.11.2026' < day"),
            PredicateError::InvalidTime { text, .. } if text == "22.11.2026"
        ));
        assert!(matches!(parse_error("day = DATE '2026-11-22 08:00:00'"), PredicateError::InvalidTime { .. }));
        for (sql, expected) in [("n = 1 n = 2", "n"), ("n = 1; n = 2", ";"), ("n = 1)", ")")] {
            assert!(matches!(parse_error(sql), PredicateError::TrailingText { found } if found == expected));
        }
        let nested = format!("{}n = 1{}", "(".repeat(5_000), ")".repeat(5_000));
        assert!(matches!(parse_error(&nested), PredicateError::Syntax { .. }));
    }

    #[test]
    fn a_generated_predicate_of_many_thousand_terms_is_read() {
        let sql = vec!["n = 7"; 5_000].join(" OR ");
        assert_eq!(evaluate(&sql, &numbers()), [F, F, F, U]);
    }

    #[test]
    fn the_canonical_text_ignores_how_a_predicate_is_written() {
        for (left, right) in [
            ("n=1 and  Label is not null", "(\"n\" = 1)\nAND (\"Label\" IS NOT NULL)"),
            ("a = 1 AND (b = 2 AND c = 3)", "a = 1 AND b = 2 AND c = 3"),
            ("5 > n", "n < 5"),
            ("n != .5", "n <> 5e-1"),
            ("n BETWEEN 1 AND 2", "n >= 1 AND n <= 2"),
            ("n IN (1)", "n = 1"),
            ("t = DATE '2026-11-22'", "t = TIMESTAMP '2026-11-22T01:00:00+01:00'"),
        ] {
            let text = |sql| Predicate::parse(sql).unwrap().to_string();
            assert_eq!(text(left), text(right));
        }
        let predicate = Predicate::parse("NOT (\"a \"\"b\" LIKE 'it''s %' OR n = -1e300 AND flag) AND d < NULL");
        let predicate = predicate.unwrap();
        assert_eq!(
            predicate.to_string(),
            "NOT (\"a \"\"b\" LIKE 'it''s %' OR (\"n\" = -1e300 AND \"flag\" = TRUE)) AND \"d\" < NULL"
        );
        assert_eq!(Predicate::parse(&predicate.to_string()).unwrap(), predicate);
        let columns: Vec<_> = predicate.columns().iter().map(String::as_str).collect();
        assert_eq!(columns, ["a \"b", "d", "flag", "n"]);
        let texts = ["n = '1'", "n = 1", "n = 1.0", "N = 1"].map(|sql| Predicate::parse(sql).unwrap());
        assert!(texts.windows(2).all(|pair| pair[0].to_string() != pair[1].to_string()));
    }

    // Row groups and partitions.

    /// Writes a Parquet file with row groups of `group_rows` rows, texts in the statistics cut to 4
    /// bytes.
    fn parquet(rows: &RecordBatch, group_rows: usize, statistics: EnabledStatistics) -> ArrowReaderMetadata {
        let properties = WriterProperties::builder()
            .set_max_row_group_row_count(Some(group_rows))
            .set_statistics_enabled(statistics)
            .set_statistics_truncate_length(Some(4))
            .build();
        let mut file = Vec::new();
        let mut writer = ArrowWriter::try_new(&mut file, rows.schema(), Some(properties)).unwrap();
        writer.write(rows).unwrap();
        writer.close().unwrap();
        let file = Bytes::from(file);
        ArrowReaderMetadata::load(&file, ArrowReaderOptions::new()).unwrap()
    }

    fn may_match(sql: &str, metadata: &ArrowReaderMetadata) -> Vec<bool> {
        let predicate = Predicate::parse(sql).unwrap();
        predicate.may_match(metadata.metadata(), metadata.schema()).unwrap()
    }

    /// Rows for three row groups of two.
    fn three_groups() -> RecordBatch {
        let texts = ["train/a", "train/b", "valid/a", "valid/a", "valid/a", "valid/a"];
        let at = TimestampMicrosecondArray::from(vec![0, 1, 10, 11, 20, 21]);
        let price = Decimal128Array::from(vec![100, 199, 200, 250, 300, 301]);
        batch([
            column("n", Int64Array::from(vec![Some(1), Some(2), Some(5), None, None, None])),
            column("m", Int64Array::from(vec![3, 3, 3, 3, 3, 3])),
            column("path", StringArray::from(texts.to_vec())),
            column("x", Float64Array::from(vec![f64::NAN, 1.0, f64::NAN, f64::NAN, 2.0, 3.0])),
            column("ok", BooleanArray::from(vec![T, T, F, F, T, F])),
            column("at", at.with_timezone("UTC")),
            column("hash", UInt64Array::from(vec![1, 2, 3, u64::MAX, 5, 6])),
            column("price", price.with_precision_and_scale(10, 2).unwrap()),
        ])
    }

    #[test]
    fn row_groups_are_skipped_only_where_statistics_prove_it() {
        let metadata = parquet(&three_groups(), 2, EnabledStatistics::Chunk);
        for (sql, expected) in [
            ("n = 2", [true, false, false]),
            ("n > 2", [false, true, false]),
            ("n <> 5", [true, false, false]),
            ("NOT n = 5", [true, false, false]),
            ("NOT (n < 3 OR n > 4)", [false, false, false]),
            ("n IN (0, 5, 9)", [false, true, false]),
            ("n NOT IN (0, 5, 9)", [true, false, false]),
            ("n IN (0, NULL)", [false, false, false]),
            ("n IS NULL", [false, true, true]),
            ("n IS NOT NULL", [true, true, false]),
            ("NOT (n IS NULL)", [true, true, false]),
            ("n < m", [true, false, false]),
            ("m < n", [false, true, false]),
            ("n = 1 OR m = 4", [true, false, false]),
            ("n = 1 AND m = 4", [false, false, false]),
            ("n BETWEEN 2 AND 4.5", [true, false, false]),
            ("ok", [true, false, true]),
            ("NOT ok", [false, true, true]),
            ("path LIKE 'train/%'", [true, false, false]),
            ("path LIKE 'valid/b%'", [false, true, true]),
            ("path LIKE '%b'", [true, true, true]),
            ("path NOT LIKE 'train/%'", [true, true, true]),
            ("x > 1.5", [false, true, true]),
            ("at < '1970-01-01 00:00:00.00001'", [true, false, false]),
            ("at >= TIMESTAMP '1970-01-01 01:00:00.00002+01:00'", [false, false, true]),
            ("hash > 9223372036854775807", [false, true, false]),
            ("price BETWEEN 1.5 AND 2", [true, true, false]),
            ("TRUE", [true, true, true]),
            ("FALSE", [false, false, false]),
            ("NULL OR n = 5", [false, true, false]),
            ("elsewhere = 5", [true, true, true]),
            ("elsewhere = 5 AND n = 5", [false, true, false]),
            ("NOT (elsewhere = 5 OR n = 5)", [true, false, false]),
        ] {
            assert_eq!(may_match(sql, &metadata), expected, "{sql}");
        }
    }

    #[test]
    fn a_text_bound_that_was_cut_is_not_taken_for_a_value() {
        let texts = StringArray::from(vec!["abcdefgh", "abcdefgh", "abcd", "abcd"]);
        let dictionary = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
        for data_type in [DataType::Utf8, DataType::LargeUtf8, DataType::Utf8View, dictionary] {
            let rows = batch([("s".to_owned(), cast(&texts, &data_type).unwrap())]);
            let metadata = parquet(&rows, 2, EnabledStatistics::Chunk);
            assert_eq!(metadata.schema().field(0).data_type(), &data_type);
            let statistics = metadata.metadata().row_group(0).column(0).statistics();
            assert!(!statistics.unwrap().max_is_exact(), "the test needs a cut bound");
            assert_eq!(may_match("s <> 'abcd'", &metadata), [true, false], "{data_type}");
            assert_eq!(may_match("s = 'abcdefgh'", &metadata), [true, false], "{data_type}");
            assert_eq!(may_match("s > 'abcd'", &metadata), [true, false], "{data_type}");
            assert_eq!(may_match("s LIKE 'abcdef%'", &metadata), [true, false], "{data_type}");
            assert_eq!(may_match("s > 'abce'", &metadata), [false, false], "{data_type}");
        }
    }

    #[test]
    fn without_statistics_every_row_group_may_match() {
        let metadata = parquet(&three_groups(), 2, EnabledStatistics::None);
        for sql in ["n = 77", "n IS NULL", "n IS NOT NULL", "path LIKE 'z%'", "n < m", "NOT ok"] {
            assert_eq!(may_match(sql, &metadata), [true; 3], "{sql}");
        }
    }

    #[test]
    fn bounds_of_the_deprecated_order_are_not_used() {
        let rows = batch([column("s", StringArray::from(vec!["a", "z"]))]);
        let metadata = parquet(&rows, 2, EnabledStatistics::Chunk);
        let with_statistics = |deprecated| {
            let bound = |text: &str| Some(ByteArray::from(text));
            let statistics = ValueStatistics::new(bound("a"), bound("b"), None, Some(0), deprecated);
            let group = metadata.metadata().row_group(0).clone();
            let chunk = group.column(0).clone().into_builder();
            let chunk = chunk.set_statistics(Statistics::ByteArray(statistics));
            let group = group.into_builder().set_column_metadata(vec![chunk.build().unwrap()]);
            let groups = vec![group.build().unwrap()];
            let file = metadata.metadata().file_metadata().clone();
            let predicate = Predicate::parse("s = 'z'").unwrap();
            predicate.may_match(&ParquetMetaData::new(file, groups), metadata.schema()).unwrap()
        };
        assert_eq!(with_statistics(true), [true]);
        assert_eq!(with_statistics(false), [false], "the same bounds in the order of today");
    }

    #[test]
    fn files_are_skipped_by_their_partition_values() {
        let value = |name: &str, value: Option<&str>| (name.to_owned(), value.map(str::to_owned));
        let values = BTreeMap::from([value("ds", Some("2026-11-22")), value("split", None)]);
        for (sql, expected) in [
            ("ds = '2026-11-22'", true),
            ("ds <> '2026-11-22'", false),
            ("ds >= '2026-11-23'", false),
            ("ds IN ('2026-11-21', '2026-11-22')", true),
            ("ds LIKE '2026-10%'", false),
            ("ds LIKE '2026-11%'", true),
            ("ds IS NULL", false),
            ("split IS NULL", true),
            ("split IS NOT NULL", false),
            ("split = 'train'", false),
            ("NOT split = 'train'", false),
            ("ds = split", false),
            ("n = 5", true),
            ("ds = '2026-01-01' OR n = 5", true),
            ("ds = '2026-01-01' AND n = 5", false),
            ("NOT (ds = '2026-11-22' AND n = 5)", true),
        ] {
            let predicate = Predicate::parse(sql).unwrap();
            assert_eq!(predicate.partition_may_match(&values).unwrap(), expected, "{sql}");
        }
        let number = Predicate::parse("ds = 20261122").unwrap();
        let error = number.partition_may_match(&values).unwrap_err();
        assert!(matches!(error, PredicateError::TypeMismatch { .. }));
    }

    /// Knuth's MMIX congruential generator: enough to vary a test, the same on every machine.
    struct Draws(u64);

    impl Draws {
        fn below(&mut self, limit: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % limit
        }

        fn pick<'a>(&mut self, choices: &[&'a str]) -> &'a str {
            let limit = u64::try_from(choices.len()).unwrap();
            choices[usize::try_from(self.below(limit)).unwrap()]
        }
    }

    fn random_rows(draws: &mut Draws) -> RecordBatch {
        let mut columns: [Vec<Option<u64>>; 6] = std::array::from_fn(|_| Vec::new());
        for group in 0..40 {
            // Each group draws from its own short range, so that there is something to skip.
            let (base, null_rate) = (group % 7, [0, 3, 10][usize::try_from(group % 3).unwrap()]);
            for _ in 0..5 {
                for values in &mut columns {
                    let is_null = draws.below(10) < null_rate;
                    values.push((!is_null).then_some(base + draws.below(3)));
                }
            }
        }
        let [n, m, x, text, flag, time] = columns;
        let signed = |value: u64| i64::try_from(value).unwrap() - 4;
        let float = |value| match value {
            1 => f64::NAN,
            4 => -0.0,
            other => signed(other) as f64 / 2.0,
        };
        let words = ["", "cat", "catalog", "catalogue", "dog", "dö", "doge", "zebra", "\u{10FFFF}zz"];
        let word = |value: u64| words[usize::try_from(value).unwrap()];
        let small = |value: u64| f32::from(u8::try_from(value).unwrap()) / 10.0;
        let day = |value: u64| i32::try_from(value).unwrap();
        batch([
            column("n", n.into_iter().map(|value| value.map(signed)).collect::<Int64Array>()),
            column("m", m.into_iter().map(|value| value.map(small)).collect::<Float32Array>()),
            column("x", x.into_iter().map(|value| value.map(float)).collect::<Float64Array>()),
            column("s", text.into_iter().map(|value| value.map(word)).collect::<StringArray>()),
            column("b", flag.into_iter().map(|value| value.map(|v| v > 3)).collect::<BooleanArray>()),
            column("d", time.into_iter().map(|value| value.map(day)).collect::<Date32Array>()),
        ])
    }

    fn random_condition(draws: &mut Draws, depth: u64) -> String {
        if depth > 0 && draws.below(2) == 0 {
            let (left, right) = (random_condition(draws, depth - 1), random_condition(draws, depth - 1));
            return match draws.below(3) {
                0 => format!("({left} AND {right})"),
                1 => format!("({left} OR {right})"),
                _ => format!("NOT ({left})"),
            };
        }
        let comparison = draws.pick(&["=", "<>", "<", "<=", ">", ">="]);
        let not = draws.pick(&["", "NOT "]);
        let number = draws.pick(&["-5", "-4", "-1.5", "0", "0.1", "0.3", "0.5", "1", "2.5", "4", "NULL"]);
        let text = draws.pick(&["", "cat", "catal", "catalog", "dog", "dö", "doh", "zebra", "\u{10FFFF}"]);
        let day = draws.pick(&["1970-01-01", "1970-01-03", "1970-01-06", "1970-01-08 12:00:00"]);
        let numeric = draws.pick(&["n", "m", "x"]);
        match draws.below(9) {
            0 | 1 => format!("{numeric} {comparison} {number}"),
            2 => format!("{numeric} {not}BETWEEN {number} AND 1"),
            3 => format!("{numeric} {not}IN ({number}, 0, 2)"),
            4 => format!("s {comparison} '{text}'"),
            5 => format!("s {not}LIKE '{text}{}'", draws.pick(&["", "%", "_g%"])),
            6 => format!("d {comparison} '{day}'"),
            7 => format!("{} IS {not}NULL", draws.pick(&["n", "x", "s", "b", "d"])),
            _ => draws.pick(&["b", "b = FALSE", "n < x", "x <> m", "n = x", "b <> b"]).to_owned(),
        }
    }

    #[test]
    fn a_skipped_row_group_never_holds_a_row_to_keep() {
        let mut draws = Draws(20_261_122);
        let rows = random_rows(&mut draws);
        let metadata = parquet(&rows, 5, EnabledStatistics::Chunk);
        let (mut num_skipped, mut num_without_match) = (0, 0);
        for _ in 0..3_000 {
            let sql = random_condition(&mut draws, 3);
            let predicate = Predicate::parse(&sql).unwrap();
            let reparsed = Predicate::parse(&predicate.to_string()).unwrap();
            assert_eq!(predicate, reparsed, "{sql}");
            let kept = predicate.evaluate(&rows).unwrap();
            for (group, may_match) in may_match(&sql, &metadata).into_iter().enumerate() {
                let has_match = kept.slice(group * 5, 5).true_count() > 0;
                assert!(may_match || !has_match, "{sql}: row group {group}");
                num_skipped += usize::from(!may_match);
                num_without_match += usize::from(!has_match);
            }
        }
        // If next to nothing were skipped, the assertion above would prove nothing.
        assert!(num_skipped * 2 > num_without_match, "{num_skipped} of {num_without_match}");
    }
}
