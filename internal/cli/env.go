package cli

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"unicode"
	"unicode/utf8"
)

// environment puts --env-file and -e together; later ones win in the engine. KEY without a value takes the caller's; one that the
// caller has not set stays a bare name in -e, which removes the image's, and is left out of a file.
func environment(files, env []string) ([]string, error) {
	var all []string
	for _, f := range files {
		lines, err := readKeyFile(f, os.LookupEnv)
		if err != nil {
			return nil, err
		}
		all = append(all, lines...)
	}
	for _, e := range env {
		k, _, hasValue := strings.Cut(e, "=")
		if v, ok := os.LookupEnv(k); !hasValue && ok {
			e = k + "=" + v
		}
		all = append(all, e)
	}
	return all, nil
}

// envFlag is -e: each variable has a name.
type envFlag struct{ list }

func (v *envFlag) Set(s string) error {
	if s == "" || s[0] == '=' {
		return fmt.Errorf("invalid environment variable: %s", s)
	}
	return v.list.Set(s)
}

// readKeyFile reads lines KEY=value or KEY, whose value lookup has; nil leaves them out, as does one that it has not. Empty lines and
// those that begin with # are comments.
func readKeyFile(path string, lookup func(string) (string, bool)) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // read only
	var env []string
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for n := 1; sc.Scan(); n++ {
		line := sc.Text()
		if n == 1 {
			line = strings.TrimPrefix(line, "\ufeff")
		}
		if !utf8.ValidString(line) {
			return nil, fmt.Errorf("%s contains invalid utf8 bytes at line %d", path, n)
		}
		line = strings.TrimLeftFunc(line, unicode.IsSpace)
		if line == "" || line[0] == '#' {
			continue
		}
		k, v, hasValue := strings.Cut(line, "=")
		switch {
		case k == "":
			return nil, fmt.Errorf("%s:%d: no variable name on line '%s'", path, n, line)
		case strings.ContainsFunc(k, unicode.IsSpace):
			return nil, fmt.Errorf("%s:%d: variable '%s' contains whitespaces", path, n, k)
		case hasValue:
			env = append(env, k+"="+v)
		case lookup != nil:
			if v, ok := lookup(k); ok {
				env = append(env, k+"="+v)
			}
		}
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return env, nil
}

// keyValues turns KEY=value words into a map; a word without "=" has the value "".
func keyValues(words []string) map[string]string {
	m := make(map[string]string, len(words))
	for _, w := range words {
		k, v, _ := strings.Cut(w, "=")
		m[k] = v
	}
	return m
}
