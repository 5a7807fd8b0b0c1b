package build

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"conex/internal/disk"
	"conex/internal/dockerfile"
	"conex/internal/image"
	"conex/internal/ocispec"
)

// planOnly is a builder that can plan: every image that is asked for has base for a config. Names that begin with "no" are not there.
func planOnly(t testing.TB, base *ocispec.ImageConfig) *Builder {
	t.Helper()
	root, err := disk.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return &Builder{Root: root, Base: func(_ context.Context, ref string, plat ocispec.Platform, _ bool, _ func(current, total int64)) (image.Image, error) {
		if strings.HasPrefix(ref, "no") {
			return image.Image{}, fmt.Errorf("%s is not there", ref)
		}
		var c ocispec.Image
		c.Platform, c.Config = plat, *base
		return image.Image{ID: ocispec.FromBytes([]byte(ref)), Config: c}, nil
	}}
}

func planRequest(file string, args ...string) Request {
	req := Request{Context: "-", Stdin: strings.NewReader(file), BuildArgs: map[string]*string{}}
	for i := 0; i < len(args); i += 2 {
		req.BuildArgs[args[i]] = &args[i+1]
	}
	return req
}

// rules gives findings as "line rule".
func rules(list []dockerfile.Finding) []string {
	var out []string
	for _, f := range list {
		out = append(out, fmt.Sprintf("%d %s", f.Lines.First, f.Rule))
	}
	return out
}

// TestCheckPlans has what only a plan knows.
func TestCheckPlans(t *testing.T) {
	var base ocispec.ImageConfig
	base.Env, base.Shell, base.OnBuild = []string{"BASE=1"}, []string{"/bin/ash", "-c"}, []string{"COPY $TRIGGER /"}
	b := planOnly(t, &base)
	for name, c := range map[string]struct {
		file string
		args []string
		want []string
		err  string
	}{
		"the base's variables and shell":    {file: "FROM x\nLABEL a=$BASE\nCMD serve\n", want: []string{"1 UndefinedVar"}},
		"scratch has neither":               {file: "FROM scratch\nLABEL a=$BASE\nCMD serve\n", want: []string{"2 UndefinedVar", "3 JSONArgsRecommended"}},
		"an ARG of the stage below":         {file: "FROM scratch AS a\nARG V=1\nFROM a\nLABEL v=$V\n"},
		"an ARG of another stage":           {file: "FROM scratch AS a\nARG V=1\nFROM scratch\nLABEL v=$V\n", want: []string{"4 UndefinedVar"}},
		"a default that needs an argument":  {file: "ARG V\nFROM x:$V\n", args: []string{"V", "1"}, want: []string{"2 InvalidDefaultArgInFrom", "2 UndefinedVar"}},
		"a default that is fine":            {file: "ARG V=1\nFROM scratch AS a\nFROM x:$V AS b\n", want: []string{"3 UndefinedVar"}},
		"an ARG's default":                  {file: "FROM scratch\nARG A=$NONE\n", want: []string{"2 UndefinedVar"}},
		"an ARG's default that is not used": {file: "FROM scratch\nARG A=$NONE\n", args: []string{"A", "1"}},
		"a platform":                        {file: "FROM --platform=$TARGETPLATFORM scratch\n", want: []string{"1 RedundantTargetPlatform"}},
		"a stage that is not there":         {file: "FROM none AS a\nFROM scratch AS B\nFROM a\nFROM scratch\nLABEL a=$b\n", want: []string{"2 StageNameCasing", "5 UndefinedVar"}, err: "none is not there"},
		"a step that can't be":              {file: "FROM scratch\nSTOPSIGNAL x\nFROM scratch\nLABEL a=$b\n", want: []string{"4 UndefinedVar"}, err: "invalid signal: x"},
		"required secrets are not asked":    {file: "FROM scratch\nRUN --mount=type=secret,id=x,required=true true\n"},
	} {
		t.Run(name, func(t *testing.T) {
			res, err := b.Check(t.Context(), planRequest(c.file, c.args...))
			if err != nil {
				t.Fatal(err)
			}
			if got := rules(res.Findings); !slices.Equal(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
			if res.Err == nil != (c.err == "") || res.Err != nil && (!strings.Contains(res.Err.Error(), c.err) || Place(res.Err).First == 0) {
				t.Errorf("%v, want %q", res.Err, c.err)
			}
		})
	}
	if _, err := b.Check(t.Context(), planRequest("FROM scratch\nNOTHING\n")); Place(err).First != 2 {
		t.Errorf("no grammar: %v", err)
	}
	if res, err := b.Check(t.Context(), planRequest("FROM scratch AS A\n", "BUILDKIT_DOCKERFILE_CHECK", "skip=all")); err != nil || len(res.Findings) > 0 {
		t.Errorf("BUILDKIT_DOCKERFILE_CHECK: %v, %v", res.Findings, err)
	}
}

// TestCheckIgnored holds sources against the ignore file.
func TestCheckIgnored(t *testing.T) {
	e := newEnv(t)
	for _, c := range []struct {
		ignore, copy string
		want         bool
	}{
		{"*.key", "a.key /", true}, {"*.key", "sub/a.key /", false}, {"**/*.key", "sub/a.key b /x/", true}, {"sub", "sub/x /", true}, {"sub", "./sub/ /x", true},
		{"sub", "subs /", false}, {"sub\n!sub/x", "sub/x /", false}, {"*", ". /", true}, {"*\n!a", ". /", false}, {"a", ". /", false}, {"*.key", "--from=x a.key /", false},
		{"*", "<<a /\nx\na", false}, {"", "a /", false}, {"a*", "$N /", false},
	} {
		e.write(".dockerignore", c.ignore)
		e.write("Dockerfile", "FROM scratch AS x\nFROM scratch\nCOPY "+c.copy+"\n")
		b := planOnly(t, &ocispec.ImageConfig{})
		res, err := b.Check(t.Context(), Request{Context: e.ctx})
		if err != nil || res.Err != nil {
			t.Fatal(err, res.Err)
		}
		got := slices.ContainsFunc(res.Findings, func(f dockerfile.Finding) bool {
			return f.Rule == "CopyIgnoredFile" && strings.Contains(f.Mend, ".dockerignore")
		})
		if got != c.want {
			t.Errorf("%q, COPY %s: %v", c.ignore, c.copy, rules(res.Findings))
		}
	}
}

// TestMissing has what an error says of a source that is not there.
func TestMissing(t *testing.T) {
	e := newEnv(t)
	e.write("src/app.js", "x")
	e.write("secret.key", "x")
	e.write(".dockerignore", "*.key\n")
	for source, want := range map[string]string{
		"srcc": `"/srcc": not found (did you mean "/src"?)`, "src/app.jss": `(did you mean "/src/app.js"?)`, "Src/app.js": `(did you mean "/src/app.js"?)`,
		"secret.key": `"/secret.key": not found: "*.key" in the ignore file keeps it out`, "something/else": `"/something/else": not found`,
	} {
		_, err := e.build("FROM scratch\nCOPY " + source + " /\n")
		if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", source, err, want)
		}
	}
	if _, err := e.build("FROM scratch AS a\nCOPY src /src\nFROM scratch\nCOPY --from=a /src/ap.js /\n"); err == nil || !strings.Contains(err.Error(), `did you mean "/src/app.js"?`) {
		t.Errorf("of a stage: %v", err)
	}
}

func TestOutline(t *testing.T) {
	b := planOnly(t, &ocispec.ImageConfig{})
	const file = `ARG inherited=box
ARG inherited2=box2
ARG unused=abc${inherited2}
# sfx is a suffix
ARG sfx="usy${inherited}"
FROM b${sfx} AS first
# this is not assigned to anything
ARG FOO=123
# BAR is a number
ARG BAR=456
RUN --mount=type=secret,target=/etc/pw,required=true --mount=type=secret,id=second$BAR,env=X true
FROM alpine${unused} AS second
ARG BAZ
RUN --mount=type=ssh true
FROM scratch AS third
ARG ABC=a
ARG sfx
ARG TARGETARCH
# target defines a target
FROM third AS target
COPY --from=first /etc/passwd /
FROM second
`
	req := planRequest(file, "BAR", "678")
	req.Target = "target"
	out, err := b.Outline(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(out)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"name":"target","description":"defines a target","args":[` +
		`{"name":"inherited","value":"box","location":{"ranges":[{"start":{"line":1},"end":{"line":1}}]}},` +
		`{"name":"sfx","description":"is a suffix","value":"usybox","location":{"ranges":[{"start":{"line":5},"end":{"line":5}}]}},` +
		`{"name":"FOO","value":"123","location":{"ranges":[{"start":{"line":8},"end":{"line":8}}]}},` +
		`{"name":"BAR","description":"is a number","value":"678","location":{"ranges":[{"start":{"line":10},"end":{"line":10}}]}},` +
		`{"name":"ABC","value":"a","location":{"ranges":[{"start":{"line":16},"end":{"line":16}}]}}],` +
		`"secrets":[{"name":"pw","required":true,"location":{"ranges":[{"start":{"line":11},"end":{"line":11}}]}},` +
		`{"name":"second678","location":{"ranges":[{"start":{"line":11},"end":{"line":11}}]}}],"sources":`
	if got, _, _ := strings.Cut(string(raw), `"sources":`); got+`"sources":` != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if out, err = b.Outline(t.Context(), planRequest(file)); err != nil || len(out.SSH) != 1 || out.SSH[0].Name != "default" || out.Name != "" {
		t.Errorf("%+v, %v", out, err)
	}
}

// TestTargetPlatform has the config's platform and the arguments that tell it, as BuildKit 0.34 gives them.
func TestTargetPlatform(t *testing.T) {
	b := planOnly(t, &ocispec.ImageConfig{})
	here := platformString(platform())
	for _, c := range []struct{ platform, file, label, want string }{
		{"", "FROM x\n", here, here},
		{"linux/arm64", "FROM x\n", "linux/arm64", "linux/arm64"},
		{"arm", "FROM x\n", "linux/arm/v7", "linux/arm/v7"},
		{"linux/arm64/v8", "FROM --platform=$BUILDPLATFORM x\n", "linux/arm64", "linux/arm64"},
		{"linux/riscv64", "FROM --platform=$BUILDPLATFORM x AS a\nFROM a\n", "linux/riscv64", "linux/riscv64"},
		{"", "FROM --platform=linux/s390x x\n", here, "linux/s390x"},
		{"linux/arm/v6", "ARG P=linux/386\nFROM --platform=${P} scratch\n", "linux/arm/v6", "linux/arm/v6"},
	} {
		req := planRequest(c.file + "ARG TARGETPLATFORM BUILDPLATFORM\nLABEL t=$TARGETPLATFORM b=$BUILDPLATFORM\n")
		req.Platform = c.platform
		err := b.planned(t.Context(), req, func(ctx context.Context, p *planner) error {
			s, err := p.all(ctx)
			if err != nil {
				return err
			}
			labels := s.cfg.image.Config.Labels
			if got := platformString(s.cfg.image.Platform); got != c.want || labels["t"] != c.label || labels["b"] != here {
				t.Errorf("%q, %q: %s, %v", c.platform, c.file, got, labels)
			}
			return nil
		})
		if err != nil {
			t.Errorf("%q, %q: %v", c.platform, c.file, err)
		}
	}
}

// TestHostilePlans are files whose text is fine and whose plan asks for too much.
func TestHostilePlans(t *testing.T) {
	b := planOnly(t, &ocispec.ImageConfig{})
	many := func(n int, line string) string {
		var s strings.Builder
		for i := range n {
			fmt.Fprintf(&s, line, i)
		}
		return s.String()
	}
	for name, c := range map[string]struct{ file, want string }{
		"labels of megabytes":      {"FROM scratch\nENV a=" + strings.Repeat("a", 60000) + "\n" + many(2000, "LABEL l%d=$a$a$a$a\n"), "the image's config would have more than"},
		"ports without end":        {"FROM scratch\n" + many(5000, "EXPOSE 1-65535 %d\n"), "the image's config would have more than"},
		"arguments":                {"ARG a=" + strings.Repeat("a", 60000) + "\n" + many(4000, "ARG b%d=$a$a$a$a\n") + "FROM scratch\n", "the image's config would have more than"},
		"triggers again and again": {"FROM scratch AS a\n" + many(5000, "ONBUILD LABEL l%d=1\n") + many(500, "FROM a AS s%d\n"), "more than 50000 steps"},
		"heredocs that expand":     {"FROM scratch\nENV a=" + strings.Repeat("a", 50000) + "\n" + many(100, "COPY <<E /%d\n"+strings.Repeat("$a", 300)+"\nE\n"), "the variables of the file expand to more than"},
		"stages on each other":     {"FROM scratch AS s0\n" + chain(990), ""},
		"steps and variables":      {"FROM scratch\n" + many(2000, "ENV v%d="+strings.Repeat("$none", 20)+"\nRUN x\n"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			res, err := b.Check(t.Context(), planRequest(c.file))
			if err != nil {
				t.Fatal(err)
			}
			if res.Err == nil != (c.want == "") || res.Err != nil && (!strings.Contains(res.Err.Error(), c.want) || Place(res.Err).First == 0) {
				t.Errorf("%.300v, want %q", res.Err, c.want)
			}
		})
	}
}

// chain is n stages, each on the one before, with what each adds.
func chain(n int) string {
	var s strings.Builder
	for i := range n {
		fmt.Fprintf(&s, "FROM s%d AS s%d\nENV v%d=1\nLABEL l%d=1\nWORKDIR /w%d\n", i, i+1, i, i, i)
	}
	return s.String()
}

// FuzzPlan plans what a Dockerfile and an image's ONBUILD say: an error with a line or none, and soon.
func FuzzPlan(f *testing.F) {
	for _, s := range [][2]string{
		{"FROM x AS a\nARG b=$c\nCOPY --from=a d e\n", "COPY --from=0 a b"}, {"ARG a\nFROM ${a:-x}\nRUN --mount=type=cache,target=$b,from=x c\nEXPOSE $d/udp\n", "ARG x=1"},
		{"FROM x\nWORKDIR a\nWORKDIR ..\nADD --chown=$a https://b/c /\nSHELL [\"a\"]\nCMD b\n", "RUN <<a\nb\na"}, {"# check=error=true\nFROM --platform=$a x\n", "ONBUILD RUN a"},
		{"FROM scratch\nCOPY <<a <<-\"b\" c/\n$d\na\nb\nHEALTHCHECK CMD $e\nSTOPSIGNAL $f\nVOLUME $g\n", "# check=skip=all\nUSER $a"},
	} {
		f.Add(s[0], s[1])
	}
	var base ocispec.ImageConfig
	b := planOnly(f, &base)
	f.Fuzz(func(t *testing.T, file, trigger string) {
		base.OnBuild, base.WorkingDir = []string{trigger}, trigger
		res, err := b.Check(t.Context(), planRequest(file))
		for _, err := range []error{err, res.Err} {
			if at := Place(err); err != nil && at.First < 1 && !errors.Is(err, ErrNoDockerfile) && !strings.Contains(err.Error(), "read context") {
				t.Fatalf("%T %v has no line", err, err)
			}
		}
		for _, x := range res.Findings {
			if x.Lines.First < 1 || x.Mend == "" {
				t.Fatalf("%+v", x)
			}
		}
		if _, err := b.Outline(t.Context(), planRequest(file)); err != nil && res.Err == nil && res.File != nil && len(res.File.Stages) == 1 {
			t.Fatalf("outline: %v", err)
		}
	})
}
