//! Whether a chat template loops over a message's content, found in its syntax tree as vLLM finds it.
//!
//! vLLM hands content to such templates as a list of parts, to others as one string. The rules below are its
//! own, with their blind spots: what it cannot follow counts as a string.

use std::collections::BTreeSet;

use minijinja::machinery::ast::{CallArg, Expr, Stmt};
use minijinja::machinery::parse;

use super::messages::ContentFormat;

/// Finds the format. A template that does not parse counts as taking strings.
pub(super) fn detect(template: &str) -> ContentFormat {
    let Ok(tree) = parse(template, "chat_template", minijinja::syntax::SyntaxConfig::default()) else {
        return ContentFormat::String;
    };
    let mut found = Found::default();
    found.statement(&tree, &[]);
    match loops_over_content(&found) {
        Some(true) => ContentFormat::Parts,
        _ => ContentFormat::String,
    }
}

/// What the rules look at.
#[derive(Default)]
struct Found<'t, 'a> {
    assignments: Vec<(&'t Expr<'a>, &'t Expr<'a>)>,
    loops: Vec<Loop<'t, 'a>>,
    macros: Vec<(&'a str, Vec<&'a str>)>,
    calls: Vec<(&'a str, &'t [CallArg<'a>])>,
}

struct Loop<'t, 'a> {
    target: &'t Expr<'a>,
    iter: &'t Expr<'a>,
    /// The macros that it stands in, by their places in `macros`.
    macros: Vec<usize>,
}

/// `None` where vLLM gives up.
fn loops_over_content(found: &Found<'_, '_>) -> Option<bool> {
    // Names that stand for the list of messages, or a part of it.
    let mut lists = vec!["messages"];
    let mut next = 0;
    while let Some(list) = lists.get(next).copied() {
        next += 1;
        for (target, value) in &found.assignments {
            if reaches(value, list, None) {
                let Expr::Var(target) = target else { return None };
                if !lists.contains(&target.id) {
                    lists.push(target.id);
                }
            }
        }
    }
    let mut messages = Vec::new();
    for each in &found.loops {
        if lists.iter().any(|list| reaches(each.iter, list, None)) {
            let Expr::Var(target) = each.target else { return None };
            messages.push(target.id);
        }
    }
    let is_content = |expr: &Expr<'_>| messages.iter().any(|name| reaches(expr, name, Some("content")));

    // Parameters of macros that are called with a message's content.
    let taking_content: Vec<BTreeSet<&str>> = found
        .macros
        .iter()
        .map(|(name, parameters)| {
            let mut taking = BTreeSet::new();
            for (_, arguments) in found.calls.iter().filter(|call| call.0 == *name) {
                for (i, argument) in arguments.iter().enumerate() {
                    match argument {
                        CallArg::Pos(value) if is_content(value) => taking.extend(parameters.get(i).copied()),
                        CallArg::Kwarg(name, value) if parameters.contains(name) && is_content(value) => {
                            taking.insert(*name);
                        }
                        _ => {}
                    }
                }
            }
            taking
        })
        .collect();

    for each in &found.loops {
        let by_name = match each.iter {
            Expr::Var(iter) => {
                each.macros.iter().any(|at| taking_content[*at].contains(iter.id))
                    || (each.macros.is_empty() && iter.id == "content")
            }
            _ => false,
        };
        if is_content(each.iter) || by_name {
            return matches!(each.target, Expr::Var(_)).then_some(true);
        }
    }
    Some(false)
}

/// Whether an expression is the variable (or its member), or a slice, filter or test of it.
fn reaches(expr: &Expr<'_>, name: &str, member: Option<&str>) -> bool {
    match expr {
        Expr::Filter(filter) => filter.expr.as_ref().is_some_and(|expr| reaches(expr, name, member)),
        Expr::Test(test) => reaches(&test.expr, name, member),
        Expr::Slice(slice) => reaches(&slice.expr, name, member),
        Expr::GetItem(item) => {
            let is_var = matches!(&item.expr, Expr::Var(var) if var.id == name);
            let key = match &item.subscript_expr {
                Expr::Const(key) => key.value.as_str(),
                _ => None,
            };
            is_var && key.is_some() && key == member
        }
        Expr::GetAttr(attr) => {
            matches!(&attr.expr, Expr::Var(var) if var.id == name) && Some(attr.name) == member
        }
        Expr::Var(var) => member.is_none() && var.id == name,
        _ => false,
    }
}

impl<'t, 'a> Found<'t, 'a> {
    fn body(&mut self, statements: &'t [Stmt<'a>], inside: &[usize]) {
        for statement in statements {
            self.statement(statement, inside);
        }
    }

    fn statement(&mut self, statement: &'t Stmt<'a>, inside: &[usize]) {
        match statement {
            Stmt::Template(template) => self.body(&template.children, inside),
            Stmt::EmitExpr(emit) => self.expression(&emit.expr),
            Stmt::ForLoop(each) => {
                self.loops.push(Loop { target: &each.target, iter: &each.iter, macros: inside.to_vec() });
                self.expression(&each.iter);
                each.filter_expr.iter().for_each(|expr| self.expression(expr));
                self.body(&each.body, inside);
                self.body(&each.else_body, inside);
            }
            Stmt::IfCond(cond) => {
                self.expression(&cond.expr);
                self.body(&cond.true_body, inside);
                self.body(&cond.false_body, inside);
            }
            Stmt::WithBlock(with) => {
                with.assignments.iter().for_each(|(_, value)| self.expression(value));
                self.body(&with.body, inside);
            }
            Stmt::Set(set) => {
                self.assignments.push((&set.target, &set.expr));
                self.expression(&set.expr);
            }
            Stmt::SetBlock(set) => self.body(&set.body, inside),
            Stmt::AutoEscape(block) => self.body(&block.body, inside),
            Stmt::FilterBlock(block) => self.body(&block.body, inside),
            Stmt::Block(block) => self.body(&block.body, inside),
            Stmt::Macro(declared) => {
                let name = |arg: &Expr<'a>| match arg {
                    Expr::Var(var) => Some(var.id),
                    _ => None,
                };
                self.macros.push((declared.name, declared.args.iter().filter_map(name).collect()));
                let inside = [inside, &[self.macros.len() - 1]].concat();
                self.body(&declared.body, &inside);
            }
            Stmt::CallBlock(block) => {
                self.call(&block.call.expr, &block.call.args);
                self.body(&block.macro_decl.body, inside);
            }
            Stmt::Do(block) => self.call(&block.call.expr, &block.call.args),
            Stmt::EmitRaw(_)
            | Stmt::Import(_)
            | Stmt::FromImport(_)
            | Stmt::Extends(_)
            | Stmt::Include(_)
            | Stmt::Continue(_)
            | Stmt::Break(_) => {}
        }
    }

    fn call(&mut self, callee: &'t Expr<'a>, arguments: &'t [CallArg<'a>]) {
        if let Expr::Var(var) = callee {
            self.calls.push((var.id, arguments));
        }
        self.expression(callee);
        self.arguments(arguments);
    }

    fn arguments(&mut self, arguments: &'t [CallArg<'a>]) {
        for argument in arguments {
            match argument {
                CallArg::Pos(value)
                | CallArg::Kwarg(_, value)
                | CallArg::PosSplat(value)
                | CallArg::KwargSplat(value) => self.expression(value),
            }
        }
    }

    fn expression(&mut self, expr: &'t Expr<'a>) {
        match expr {
            Expr::Var(_) | Expr::Const(_) => {}
            Expr::Slice(slice) => {
                self.expression(&slice.expr);
                [&slice.start, &slice.stop, &slice.step]
                    .into_iter()
                    .flatten()
                    .for_each(|e| self.expression(e));
            }
            Expr::UnaryOp(op) => self.expression(&op.expr),
            Expr::BinOp(op) => {
                self.expression(&op.left);
                self.expression(&op.right);
            }
            Expr::Compare(compare) => {
                self.expression(&compare.expr);
                compare.ops.iter().for_each(|op| self.expression(&op.expr));
            }
            Expr::IfExpr(cond) => {
                self.expression(&cond.test_expr);
                self.expression(&cond.true_expr);
                cond.false_expr.iter().for_each(|e| self.expression(e));
            }
            Expr::Filter(filter) => {
                filter.expr.iter().for_each(|e| self.expression(e));
                self.arguments(&filter.args);
            }
            Expr::Test(test) => {
                self.expression(&test.expr);
                self.arguments(&test.args);
            }
            Expr::GetAttr(attr) => self.expression(&attr.expr),
            Expr::GetItem(item) => {
                self.expression(&item.expr);
                self.expression(&item.subscript_expr);
            }
            Expr::Call(call) => self.call(&call.expr, &call.args),
            Expr::List(list) => list.items.iter().for_each(|e| self.expression(e)),
            Expr::Tuple(tuple) => tuple.items.iter().for_each(|e| self.expression(e)),
            Expr::Map(map) => {
                map.keys.iter().chain(&map.values).for_each(|e| self.expression(e));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_found_as_vllm_finds_them() {
        use ContentFormat::{Parts, String};
        for (template, format) in [
            ("{% for m in messages %}{{ m['content'] }}{% endfor %}", String),
            ("{% for m in messages %}{% for c in m['content'] %}{{ c.text }}{% endfor %}{% endfor %}", Parts),
            ("{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}", Parts),
            (
                "{% set x = messages[1:] %}{% for m in x %}{% for c in m.content | list %}{% endfor %}{% endfor %}",
                Parts,
            ),
            (
                "{% for m in messages %}{% set content = m.content %}{% for c in content %}{% endfor %}{% endfor %}",
                Parts,
            ),
            (
                "{% macro r(a) %}{% for c in a %}{% endfor %}{% endmacro %}{% for m in messages %}{{ r(m.content) }}{% endfor %}",
                Parts,
            ),
            (
                "{% macro r(a) %}{% for c in a %}{% endfor %}{% endmacro %}{% for m in messages %}{{ r(a=m.content) }}{% endfor %}",
                Parts,
            ),
            ("{% macro r(content) %}{% for c in content %}{% endfor %}{% endmacro %}{{ r('x') }}", String),
            ("{% for m in messages %}{% for c in m.tool_calls %}{% endfor %}{% endfor %}", String),
            (
                "{% set ns = namespace(x=0) %}{% set ns.x = messages %}{% for m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}",
                String,
            ),
            ("{% broken", String),
        ] {
            assert_eq!(detect(template), format, "{template}");
        }
    }
}
