package dockerfile

import (
	"errors"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	f, err := Parse("D", []byte("# c\nARG V=1\nFROM a:$V AS One\nRUN x \\\n  y\nCOPY --from=q --chown=1 a b /c/\nFROM scratch\n"))
	if err != nil {
		t.Fatal(err)
	}
	if len(f.Args) != 1 || len(f.Stages) != 2 || f.Stages[0].Name != "one" || f.Stages[0].Base != "a:$V" {
		t.Fatalf("%+v", f)
	}
	run := f.Stages[0].Steps[0]
	if run.Lines != (Lines{4, 5}) || run.Keyword() != "RUN" || run.Instruction.(*Run).Args[0] != "x   y" {
		t.Errorf("%+v %+v", run, run.Instruction)
	}
	c := f.Stages[0].Steps[1].Instruction.(*Copy)
	if c.From != "q" || c.Chown != "1" || len(c.Sources) != 2 || c.Dest != "/c/" {
		t.Errorf("%+v", c)
	}
}

func TestExpandLeavesTheStep(t *testing.T) {
	f, err := Parse("D", []byte("FROM x\nCOPY $A \"$B\" /$A/\nENV X=$A Y='$A'\n"))
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []string{"one", "two"} {
		in, err := f.Expand(f.Stages[0].Steps[0], List{"A=" + v, "B=b b"})
		if err != nil {
			t.Fatal(err)
		}
		if c := in.(*Copy); c.Sources[0] != v || c.Sources[1] != "b b" || c.Dest != "/"+v+"/" {
			t.Errorf("%s: %+v", v, c)
		}
		in, err = f.Expand(f.Stages[0].Steps[1], List{"A=" + v})
		if err != nil {
			t.Fatal(err)
		}
		if e := in.(*EnvVars); e.Vars[0].Value != v || e.Vars[1].Value != "$A" {
			t.Errorf("%s: %+v", v, e)
		}
	}
}

func TestParseErrors(t *testing.T) {
	for src, want := range map[string]string{
		"":                                    "dockerfile parse error on line 1: file is empty",
		"\n\nFORM x\n":                        "dockerfile parse error on line 3: unknown instruction: FORM (did you mean FROM?)",
		"FROM x\nRUN []\n":                    "dockerfile parse error on line 2",
		"FROM x\n\nCOPY a\n":                  "dockerfile parse error on line 3: COPY requires at least two arguments",
		"RUN x\n":                             "dockerfile parse error on line 1: no build stage in current context",
		"FROM x\nCOPY --nope a b\n":           "dockerfile parse error on line 2: unknown flag: --nope",
		"FROM x\nONBUILD ONBUILD RUN x":       "dockerfile parse error on line 2: Chaining ONBUILD",
		"FROM x\nRUN <<EOF\necho":             "dockerfile parse error on line 2: unterminated heredoc",
		"ARG A\n":                             "dockerfile parse error on line 1: no stage to build",
		"FROM x\nHEALTHCHECK --interval=1s x": "dockerfile parse error on line 2: Unknown type",
	} {
		_, err := Parse("D", []byte(src))
		var pe *ParseError
		if !errors.As(err, &pe) || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v, want %s", src, err, want)
		}
	}
}

func TestExcerpt(t *testing.T) {
	f := &File{Source: []byte("one\ntwo\nthree\nfour\nfive\nsix\n")}
	want := "   1 |     one\n   2 |     two\n   3 | >>> three\n   4 | >>> four\n   5 |     five\n   6 |     six"
	if got := f.Excerpt(Lines{3, 4}); got != want {
		t.Errorf("excerpt\n%s\nwant\n%s", got, want)
	}
	if got := f.Excerpt(Lines{99, 99}); got != "" {
		t.Errorf("excerpt of nowhere: %q", got)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"FROM scratch\nCOPY a b\n", "# escape=`\nFROM x AS y\nRUN <<E\n#!/bin/sh\nE\n", "FROM x\nRUN --mount=type=cache,target=$A,uid=1 x\n",
		"FROM x\nEXPOSE $A 1-2/udp\nONBUILD RUN y\nHEALTHCHECK --retries=1 CMD z\n", "FROM x\nCOPY <<\"a\" <<-b c/\n$X\na\nb\n", "FROM x\nENV A=${B:-${C%%x*}}\n",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, src string) {
		file, err := Parse("D", []byte(src))
		if err != nil {
			var pe *ParseError
			if !errors.As(err, &pe) || pe.Lines.First < 1 {
				t.Fatalf("%T %v has no line", err, err)
			}
			return
		}
		if len(file.Stages) == 0 {
			t.Fatal("no stage and no error")
		}
		env := List{"A=1", "B=two words", "PATH=/bin"}
		for _, st := range file.Stages {
			for _, s := range st.Steps {
				in, err := file.Expand(s, env)
				var pe *ParseError
				if err != nil && (!errors.As(err, &pe) || pe.Lines.First < 1) {
					t.Fatalf("%T %v has no line", err, err)
				}
				if err == nil && in == nil {
					t.Fatal("nothing and no error")
				}
				_ = file.Title(s.Code, env)
				if o, ok := s.Instruction.(*OnBuild); ok {
					if _, err := file.ParseTrigger(o.Expr, s.Lines); err != nil && !errors.As(err, &pe) {
						t.Fatalf("%T %v", err, err)
					}
				}
			}
		}
	})
}

func TestWordErrors(t *testing.T) {
	f, err := Parse("Dockerfile", []byte("FROM x\n"))
	if err != nil {
		t.Fatal(err)
	}
	for word, want := range map[string]string{"${A": `failed to process "${A": the closing } is missing`, "${A:?must}": "A: must", `"a`: "unexpected end of statement"} {
		if got, err := f.Word(word, List{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %q, %v, want %q", word, got, err, want)
		}
	}
}
