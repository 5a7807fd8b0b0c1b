// Package casefile owns the form of tables of test data: cases/*.txt hold what is asked, want/*.txt what somebody else's program answered.
//
// A file of cases holds many. Each begins with a line "== NAME" and is a txtar archive otherwise; what stands before the first is words. What a case
// means is its table's: see packages containers and dockerfiles.
package casefile

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/tools/txtar"
)

// Title says which case it is: Group is its file's name without ".txt", Name its own, unique in a table.
type Title struct{ Group, Name string }

// Read gives each case of dir/cases/*.txt to parse, in order.
func Read(dir string, parse func(Title, *txtar.Archive) error) error {
	files, err := filepath.Glob(filepath.Join(dir, "cases", "*.txt"))
	if err != nil {
		return err
	}
	seen := map[string]bool{}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		for i, part := range bytes.Split(append([]byte("\n"), data...), []byte("\n== ")) {
			if i == 0 {
				continue // what stands before the first case
			}
			name, rest, _ := strings.Cut(string(part), "\n")
			t := Title{Group: strings.TrimSuffix(filepath.Base(file), ".txt"), Name: strings.TrimSpace(name)}
			if t.Name == "" || strings.ContainsAny(t.Name, " /.") {
				return fmt.Errorf("%s: case %q: not a name", file, t.Name)
			}
			if seen[t.Name] {
				return fmt.Errorf("%s: two cases are called %s", file, t.Name)
			}
			seen[t.Name] = true
			if err := parse(t, txtar.Parse([]byte(rest))); err != nil {
				return fmt.Errorf("%s: case %s: %w", file, t.Name, err)
			}
		}
	}
	return nil
}

// Wants are answers by their cases' names, each a list of lines whose first is "input " and what identifies the case's input.
type Wants map[string][]string

// LoadWants reads dir/want/*.txt.
func LoadWants(dir string) (Wants, error) {
	files, err := filepath.Glob(filepath.Join(dir, "want", "*.txt"))
	if err != nil {
		return nil, err
	}
	w := Wants{}
	for _, file := range files {
		a, err := txtar.ParseFile(file)
		if err != nil {
			return nil, err
		}
		for _, f := range a.Files {
			w[f.Name] = strings.Split(strings.TrimSuffix(string(f.Data), "\n"), "\n")
		}
	}
	return w, nil
}

// Save writes dir/want/*.txt for the given cases, with comment at the head of each file. What no case has is gone.
func (w Wants) Save(dir, comment string, cases []Title) error {
	groups := map[string]*txtar.Archive{}
	for _, c := range cases {
		lines, ok := w[c.Name]
		if !ok {
			continue
		}
		if groups[c.Group] == nil {
			groups[c.Group] = &txtar.Archive{Comment: []byte(comment + "\n")}
		}
		groups[c.Group].Files = append(groups[c.Group].Files, txtar.File{Name: c.Name, Data: []byte(strings.Join(lines, "\n") + "\n")})
	}
	for g, a := range groups {
		if err := os.WriteFile(filepath.Join(dir, "want", g+".txt"), txtar.Format(a), 0o644); err != nil {
			return err
		}
	}
	return nil
}
