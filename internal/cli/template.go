package cli

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
	"text/tabwriter"
	"text/template"

	"conex/internal/plainjson"
)

// functions are what Docker offers in --format besides Go's own.
func functions() template.FuncMap {
	return template.FuncMap{
		"json":  toJSON,
		"split": strings.Split,
		"join":  join,
		"title": func(s string) string {
			words := strings.SplitAfter(s, " ")
			for i, w := range words {
				if w != "" {
					words[i] = strings.ToUpper(w[:1]) + w[1:]
				}
			}
			return strings.Join(words, "")
		},
		"lower": strings.ToLower,
		"upper": strings.ToUpper,
		"pad": func(s string, before, after int) string {
			if s == "" {
				return s
			}
			return strings.Repeat(" ", before) + s + strings.Repeat(" ", after)
		},
		"truncate": func(s string, n int) string { return s[:min(len(s), max(n, 0))] },
	}
}

// headerFunctions leave a column's title as it is, where functions would change a value.
func headerFunctions() template.FuncMap {
	same := func(s string) string { return s }
	return template.FuncMap{
		"json": same, "title": same, "lower": same, "upper": same,
		"split":    func(s, _ string) string { return s },
		"join":     func(s, _ string) string { return s },
		"truncate": func(s string, _ int) string { return s },
	}
}

func toJSON(v any) (string, error) {
	b, err := plainjson.Print(v, "")
	return string(b), err
}

// join puts a list's elements, or a map's values in order, in one line.
func join(list any, sep string) (string, error) {
	if list == nil {
		return "", nil
	}
	v := reflect.ValueOf(list)
	var parts []string
	switch v.Kind() {
	case reflect.Slice, reflect.Array:
		for i := range v.Len() {
			parts = append(parts, fmt.Sprint(v.Index(i).Interface()))
		}
	case reflect.Map:
		for it := v.MapRange(); it.Next(); {
			parts = append(parts, fmt.Sprint(it.Value().Interface()))
		}
		slices.Sort(parts)
	default:
		return "", fmt.Errorf("join wants a list, not %T", list)
	}
	return strings.Join(parts, sep), nil
}

func parseTemplate(format string) (*template.Template, error) {
	t, err := template.New("").Funcs(functions()).Parse(format)
	if err != nil {
		return nil, fmt.Errorf("template parsing error: %s", strings.TrimPrefix(err.Error(), "template: "))
	}
	return t, nil
}

// headings are a table's column titles by field.
type headings map[string]string

// Label is the title of a column that shows one label: the last part of its name.
func (headings) Label(name string) string {
	name = name[strings.LastIndexByte(name, '.')+1:]
	return strings.NewReplacer("-", " ", "_", " ").Replace(name)
}

// writeList prints rows as format says: a Go template, "table TEMPLATE", "json", or "table" for def, the command's own table.
func writeList[T any](out io.Writer, format, def string, head headings, rows []T) error {
	switch format {
	case "", "table":
		format = "table " + def
	case "json":
		format = "{{json .}}"
	}
	body, table := strings.CutPrefix(format, "table") // a blank behind it is customary, and not needed
	body = strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(strings.Trim(body, " "))
	t, err := parseTemplate(body)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if table {
		ht, err := t.Clone()
		if err != nil {
			return err
		}
		if err := ht.Funcs(headerFunctions()).Execute(&b, head); err != nil {
			return templateError(err)
		}
		b.WriteByte('\n')
	}
	for _, r := range rows {
		if err := t.Execute(&b, r); err != nil {
			return templateError(err)
		}
		b.WriteByte('\n')
	}
	if !table {
		_, err := out.Write(harmless(out, b.Bytes()))
		return err
	}
	lines := bufio.NewWriterSize(out, 32<<10) // the table writes each cell and its padding alone
	w := tabwriter.NewWriter(lines, 10, 1, 3, ' ', 0)
	if _, err := w.Write(harmless(out, b.Bytes())); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return lines.Flush()
}

// writeOne prints one object by a template, or as JSON for "json".
func writeOne(out io.Writer, format string, v any) error {
	if format == "json" {
		format = "{{json .}}"
	}
	t, err := parseTemplate(format)
	if err != nil {
		return &exitError{code: 64, err: err}
	}
	var b bytes.Buffer
	if err := execute(&b, t, v); err != nil {
		return err
	}
	b.WriteByte('\n')
	_, err = out.Write(harmless(out, b.Bytes()))
	return err
}

// harmless is text as a terminal gets it: images and containers chose labels, commands and names, and get no control over it. What is no
// terminal gets every byte.
func harmless(out io.Writer, text []byte) []byte {
	w := out
	if r, ok := out.(*repaint); ok {
		w = r.out
	}
	if _, tty := terminal(w); !tty {
		return text
	}
	lines := strings.Split(string(text), "\n")
	for i, l := range lines {
		cells := strings.Split(l, "\t") // which the table is made of
		for k, c := range cells {
			cells[k] = clean(c)
		}
		lines[i] = strings.Join(cells, "\t")
	}
	return []byte(strings.Join(lines, "\n"))
}

// execute runs t over v's Go fields and, if that fails, over its JSON form, whose keys may differ (.Id and .ID).
func execute(w *bytes.Buffer, t *template.Template, v any) error {
	start := w.Len()
	first := t.Execute(w, v)
	if first == nil {
		return nil
	}
	w.Truncate(start)
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode for template: %w", err)
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var generic any
	if err := d.Decode(&generic); err != nil {
		return fmt.Errorf("encode for template: %w", err)
	}
	if err := t.Option("missingkey=error").Execute(w, generic); err != nil {
		w.Truncate(start)
		return templateError(first)
	}
	return nil
}

func templateError(err error) error {
	return fmt.Errorf("template parsing error: %s", strings.TrimPrefix(err.Error(), "template: "))
}

// unknownField says of what a template gave with a row without values that it names a field that there is not. Whatever else goes wrong with
// such a row is no mistake: {{slice .ID 0 3}}.
func unknownField(err error) bool {
	return err != nil && strings.Contains(err.Error(), "can't evaluate field")
}

// short returns the first 12 digits of an id.
func short(id string) string {
	id = strings.TrimPrefix(id, "sha256:")
	return id[:min(len(id), 12)]
}

// ellipsis cuts s to n characters, the last being "…".
func ellipsis(s string, n int) string {
	r := []rune(s)
	if len(r) <= n {
		return s
	}
	if n <= 1 {
		return string(r[:n])
	}
	return string(r[:n-1]) + "…"
}
