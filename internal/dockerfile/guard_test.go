package dockerfile

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// TestHostile holds that files which ask for too much are refused with a place, each by a limit of ours and not by luck.
func TestHostile(t *testing.T) {
	nest := func(n int) string { return strings.Repeat("${a:-", n) + "x" + strings.Repeat("}", n) }
	// long makes one instruction of many short lines, since a line alone is bounded by the parser.
	long := func(piece string, n int) string { return strings.Repeat(piece+"\\\n", n) }
	var laughs strings.Builder
	for i := range 12 {
		fmt.Fprintf(&laughs, "ENV a%d=%s\n", i+1, strings.Repeat(fmt.Sprintf("$a%d", i), 10))
	}
	for name, c := range map[string]struct{ src, want string }{
		"a giant line":          {"FROM x\nRUN " + strings.Repeat("a", 70000), "line greater than max allowed size"},
		"a giant instruction":   {"FROM x\nRUN " + long(strings.Repeat("a", 60000), 30), "instruction of more than 1048576 bytes"},
		"many heredocs":         {"FROM x\nRUN " + long(strings.Repeat("<<a ", 1000), 10), "more than 1000 heredocs"},
		"deep beside a heredoc": {"FROM x\nRUN <<EOF " + long(strings.Repeat("${a:-", 1000), 100), "heredocs and more than 1000 variables"},
		"many instructions":     {"FROM x\n" + strings.Repeat("USER a\n", 20000), "a file of 20001 instructions, at most 10000"},
		"many stages":           {strings.Repeat("FROM x\n", 2000), "more than 1000 stages"},
		"many variables":        {"FROM x\nENV " + long(strings.Repeat("a=b ", 1000), 10), "more than 5000 variables and labels"},
		"a giant file":          {"FROM x\n" + strings.Repeat("# comment\n", 2<<20), "at most 16777216 are allowed"},
		"deep variables":        {"FROM x\nUSER " + nest(1000), "variables stand more than 64 deep"},
		"deep in quotes":        {"FROM x\nUSER " + strings.Repeat(`"${a:-`, 500) + strings.Repeat(`}"`, 500), "variables stand more than 64 deep"},
		"hidden ends":           {"FROM x\nUSER " + strings.Repeat("${a:-'}'", 1000), "variables stand more than 64 deep"},
		"a billion laughs":      {"FROM x\nENV a0=0123456789\n" + laughs.String(), "expand to more than 1048576 bytes"},
		"replacements":          {"FROM x\nENV a=" + strings.Repeat("a", 2000) + "\nENV b=${a//a/$a}\nENV c=${b//a/$a}\n", "expand to more than 1048576 bytes"},
		"patterns":              {"FROM x\nENV a=" + strings.Repeat("a", 60000) + "\nENV b=${a##" + strings.Repeat("*b", 20000) + "}\n", "expand to more than"},
		"a heredoc bomb": {"FROM x\nENV a=" + strings.Repeat("a", 60000) + "\nCOPY <<E /\n" + strings.Repeat(strings.Repeat("$a", 1000)+"\n", 5) + "E\n",
			"expand to more than 16777216 bytes"},
		"all ports":       {"FROM x\nEXPOSE " + strings.Repeat("1-65535 ", 2000), "EXPOSE of more than 196608 ports"},
		"many open words": {"FROM x\nLABEL a=" + strings.Repeat("${", 20000), "unsupported modifier"},
	} {
		t.Run(name, func(t *testing.T) {
			err := expandAll([]byte(c.src))
			var pe *ParseError
			if !errors.As(err, &pe) || pe.Lines.First < 1 || !strings.Contains(err.Error(), c.want) || len(pe.Err.Error()) > 1000 {
				msg := fmt.Sprint(err)
				t.Errorf("%s, want %q", msg[:min(300, len(msg))], c.want)
			}
		})
	}
}

// expandAll reads a file and expands every instruction, as a build does that runs nothing.
func expandAll(src []byte) error {
	f, err := Parse("D", src)
	if err != nil {
		return err
	}
	c, err := f.Check(nil)
	if err != nil {
		return err
	}
	for i := range f.Stages {
		st := &f.Stages[i]
		env := List{"PATH=/bin"}
		c.From(st, env, nil, st.Platform)
		sc := c.Stage(nil)
		for _, s := range st.Steps {
			_ = f.Title(s.Code, env)
			w := &Watched{Env: env}
			in, err := f.Expand(s, w)
			if err != nil {
				return err
			}
			sc.Unset(s, w.Unset, nil, env)
			sc.Step(s, in, false, "/")
			if e, ok := in.(*EnvVars); ok {
				for _, v := range e.Vars {
					env = append(env, v.String())
				}
			}
		}
	}
	return nil
}

// TestBoundIsABound holds the measure against what package shell makes of the same words.
func TestBoundIsABound(t *testing.T) {
	f, err := Parse("D", []byte("FROM x\n"))
	if err != nil {
		t.Fatal(err)
	}
	env := List{"a=0123456789", "b=x", "empty=", "slash=a/b/c", "10=ten"}
	for _, w := range []string{
		"$a", "${a}", "$a$b", "'$a'", `"$a'$b'"`, `\$a`, `"\$a"`, "${a:-$b}", "${none:-$a$a}", "${none-'}'$a}", "${b:+$a$a}", "${a#0*}", "${a##*5}", "${a%9}", "${a%%[0-9]}",
		"${slash//\\//$a}", "${slash/a/$a}", "${none:-\"${none:-'$b'}\"}", "$10", "$1x", "${a:-}", "x${a}y${b}z", "${slash//?/$a}", "${a:?no}", `"${a:-"$b"}"`,
	} {
		got, err := f.Word(w, env)
		if err != nil {
			continue
		}
		m := &measure{s: w, escape: '\\', quotes: true, env: env, limit: maxWord}
		n, err := m.until(0)
		if err != nil || n < len(got) {
			t.Errorf("%s: %q has %d bytes, measured %d, %v", w, got, len(got), n, err)
		}
	}
}

func FuzzBound(f *testing.F) {
	for _, w := range []string{"${a:-'}'$a}", `"${a//x/"$b"}"`, "`${a", `\`, "${a/b", "${a#$b}", "$10$a", "${é}"} {
		f.Add(w, false)
	}
	file, err := Parse("D", []byte("FROM x\n"))
	if err != nil {
		f.Fatal(err)
	}
	env := List{"a=0123456789", "b=xx", "é=ten chars!"}
	f.Fuzz(func(t *testing.T, w string, text bool) {
		expand, limit := file.Word, maxWord
		if text {
			expand, limit = file.Text, maxText
		}
		got, err := expand(w, env)
		if err != nil {
			return
		}
		m := &measure{s: w, escape: '\\', quotes: !text, env: env, limit: max(limit, 2*len(w))}
		// What is no UTF-8 becomes U+FFFD, three bytes for one.
		if n, err := m.until(0); err != nil || 3*n < len(got) {
			t.Errorf("%q: %q has %d bytes, measured %d, %v", w, got, len(got), n, err)
		}
	})
}

// FuzzDockerfile is a build's reading of a file, to the end: an error with a line or none, and soon.
func FuzzDockerfile(f *testing.F) {
	for _, s := range []string{
		"FROM x AS Y\nRUN a\nfrom y as z\ncmd b\nCMD [\"c\"]\n", "# check=error=true;skip=all\nFROM x\n", "ARG A\nFROM $A$B\nEXPOSE 80/TCP 1:2:3\n",
		"FROM x\n# check=skip=UndefinedVar\nCOPY $A <<B /\n$C\nB\n", "# escape=`\nFROM x\nENV a `\n\n b\n", "#!/bin/x\n# syntax=a/b\nFROM x\nENV A_TOKEN=$B C=${D//e/f}\n",
		"FROM --platform=$TARGETPLATFORM x\nHEALTHCHECK NONE\nWORKDIR a\nMAINTAINER b\n", "\xef\xbb\xbf# syntax=docker/dockerfile:1\nFROM x\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		var pe *ParseError
		if err := expandAll(src); err != nil && (!errors.As(err, &pe) || pe.Lines.First < 1 || pe.Lines.First > bytes.Count(src, []byte("\n"))+1) {
			t.Fatalf("%T %v has no line", err, err)
		}
	})
}
