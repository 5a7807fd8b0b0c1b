package dockerfile

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// checked gives a file's findings as "line rule: detail | mend", planning every stage as if its base had only PATH.
func checked(t *testing.T, src string, options *string) (list []string, fails error) {
	t.Helper()
	f, err := Parse("Dockerfile", []byte(src))
	if err != nil {
		t.Fatal(err)
	}
	c, err := f.Check(options)
	if err != nil {
		t.Fatal(err)
	}
	global := List{"TARGETPLATFORM=linux/amd64", "BUILDPLATFORM=linux/amd64"}
	var declared []string
	for _, s := range f.Args {
		for _, a := range s.Instruction.(*Arg).Args {
			declared = append(declared, a.Key)
			if a.Value != nil {
				global = append(global, a.Key+"="+*a.Value)
			}
		}
	}
	stages := map[string]*StageChecks{}
	for i := range f.Stages {
		st := &f.Stages[i]
		plat, err := f.Word(st.Platform, global)
		if err != nil {
			t.Fatal(err)
		}
		c.From(st, global, declared, plat)
		base, _ := f.Word(st.Base, global)
		sc := c.Stage(stages[base])
		stages[st.Name] = sc
		env, shell := List{"PATH=/bin"}, false
		var args []string
		for _, s := range st.Steps {
			w := &Watched{Env: env}
			in, err := f.Expand(s, w)
			if err != nil {
				t.Fatal(err)
			}
			sc.Unset(s, w.Unset, args, env)
			sc.Step(s, in, shell, "/srv")
			switch i := in.(type) {
			case *EnvVars:
				for _, v := range i.Vars {
					env = append(env, v.String())
				}
			case *Arg:
				for _, a := range i.Args {
					args = append(args, a.Key)
					if a.Value != nil {
						env = append(env, a.Key+"="+*a.Value)
					}
				}
			case *Shell:
				shell = true
			}
		}
	}
	for _, x := range c.Findings() {
		if x.Description == "" || x.Mend == "" || strings.Contains(x.Mend, "%!") || x.URL == "" {
			t.Errorf("%+v: incomplete", x)
		}
		list = append(list, fmt.Sprintf("%d %s: %s | %s", x.Lines.First, x.Rule, x.Detail, x.Mend))
	}
	return list, c.Err()
}

func TestChecks(t *testing.T) {
	all := "experimental=all"
	for name, c := range map[string]struct {
		src     string
		options *string
		want    []string
	}{
		"nothing":                 {src: "FROM x AS a\nRUN b\nCMD [\"c\"]\n"},
		"StageNameCasing":         {src: "FROM x AS Build\n", want: []string{"1 StageNameCasing: Stage name 'Build' should be lowercase | write AS build"}},
		"FromAsCasing":            {src: "FROM x as a\n", want: []string{"1 FromAsCasing: 'as' and 'FROM' keywords' casing do not match | write FROM ... AS a"}},
		"from as is consistent":   {src: "from x as a\n"},
		"NoEmptyContinuation":     {src: "FROM x\nRUN a \\\n\n  b\n", want: []string{"4 NoEmptyContinuation: Empty continuation line | remove the empty lines in this instruction, or begin them with #"}},
		"comments in a statement": {src: "FROM x\nRUN a \\\n# why\n  b\n"},
		"ConsistentInstructionCasing": {src: "FROM x\nrun a\nRUN b\nCmd [\"c\"]\n", want: []string{
			"2 ConsistentInstructionCasing: Command 'run' should match the case of the command majority (uppercase) | write RUN",
			"4 ConsistentInstructionCasing: Command 'Cmd' should match the case of the command majority (uppercase) | write CMD",
		}},
		"majority of lower case": {src: "from x\nrun a\nRUN b\n", want: []string{
			"3 ConsistentInstructionCasing: Command 'RUN' should match the case of the command majority (lowercase) | write run",
		}},
		"DuplicateStageName": {src: "FROM x AS a\nFROM x AS a\n", want: []string{
			`2 DuplicateStageName: Duplicate stage name "a", stage names should be unique | give this stage or that of line 1 another name: after this line "a" means this one`,
		}},
		"ReservedStageName": {src: "FROM x AS scratch\n", want: []string{
			`1 ReservedStageName: Stage name should not use the same name as reserved stage "scratch" | give the stage another name: "scratch" means something else in FROM and --from`,
		}},
		"JSONArgsRecommended": {src: "FROM x\nENTRYPOINT my-program start\n", want: []string{
			`2 JSONArgsRecommended: JSON arguments recommended for ENTRYPOINT to prevent unintended behavior related to OS signals | write ENTRYPOINT ["my-program", "start"]`,
		}},
		"JSONArgsRecommended, variables": {src: "FROM x\nCMD run $PATH\n", want: []string{
			`2 JSONArgsRecommended: JSON arguments recommended for CMD to prevent unintended behavior related to OS signals | write CMD ["/bin/sh", "-c", "exec run $PATH"]`,
		}},
		"JSONArgsRecommended, two commands": {src: "FROM x\nCMD a && b\n", want: []string{
			`2 JSONArgsRecommended: JSON arguments recommended for CMD to prevent unintended behavior related to OS signals | write CMD ["/bin/sh", "-c", "a && b"] with exec before the last command, or a SHELL instruction above to say that a shell is meant`,
		}},
		"a shell is meant": {src: "FROM x\nSHELL [\"/bin/ash\", \"-c\"]\nCMD a && b\n"},
		"MaintainerDeprecated": {src: "FROM x\nMAINTAINER Me <me@x.y>\n", want: []string{
			`2 MaintainerDeprecated: Maintainer instruction is deprecated in favor of using label | write LABEL org.opencontainers.image.authors="Me <me@x.y>"`,
		}},
		"UndefinedArgInFrom": {src: "ARG TAG=1\nFROM x:${TAGS}\n", want: []string{
			"2 UndefinedArgInFrom: FROM argument 'TAGS' is not declared (did you mean TAG?) | write TAG, or ARG TAGS=... before the first FROM",
		}},
		"UndefinedArgInFrom, declared in a stage": {src: "FROM x\nARG V=1\nFROM y:$V\n", want: []string{
			"3 UndefinedArgInFrom: FROM argument 'V' is not declared | move ARG V of line 2 before the first FROM: FROM sees only the arguments there",
		}},
		"WorkdirRelativePath": {src: "FROM x AS a\nWORKDIR app\nWORKDIR sub\nFROM a\nWORKDIR c\n", want: []string{
			`2 WorkdirRelativePath: Relative workdir "app" can have unexpected results if the base image changes | write WORKDIR /srv/app`,
		}},
		"UndefinedVar": {src: "FROM x\nCOPY $foo$foo $PAHT/\n", want: []string{
			`2 UndefinedVar: Usage of undefined variable '$foo' | declare it above with ARG or ENV, or write ${foo:-} if it may be empty, \$foo if no variable is meant`,
			`2 UndefinedVar: Usage of undefined variable '$PAHT' (did you mean $PATH?) | write $PATH, or declare PAHT above with ARG or ENV`,
		}},
		"UndefinedVar, global": {src: "ARG V=1\nFROM x\nLABEL v=$V arch=$TARGETARCH\n", want: []string{
			"3 UndefinedVar: Usage of undefined variable '$V' | write ARG V above, in this stage: without it an argument from before the first FROM, or a predefined one, has no value here",
			"3 UndefinedVar: Usage of undefined variable '$TARGETARCH' | write ARG TARGETARCH above, in this stage: without it an argument from before the first FROM, or a predefined one, has no value here",
		}},
		"declared without a value": {src: "FROM x\nARG V\nCOPY a$V b\nRUN echo $none\n"},
		"UndefinedVar in a heredoc": {src: "FROM x\nCOPY <<A <<'B' /\n$foo\nA\n$bar\nB\n", want: []string{
			`2 UndefinedVar: Usage of undefined variable '$foo' | declare it above with ARG or ENV, or write ${foo:-} if it may be empty, \$foo if no variable is meant`,
		}},
		"MultipleInstructionsDisallowed": {src: "FROM x\nCMD [\"a\"]\nHEALTHCHECK NONE\nCMD [\"b\"]\nHEALTHCHECK CMD c\n", want: []string{
			"2 MultipleInstructionsDisallowed: Multiple CMD instructions should not be used in the same stage because only the last one will be used | remove it: the CMD of line 4 counts",
			"3 MultipleInstructionsDisallowed: Multiple HEALTHCHECK instructions should not be used in the same stage because only the last one will be used | remove it: the HEALTHCHECK of line 5 counts",
		}},
		"one in each stage": {src: "FROM x AS a\nCMD [\"a\"]\nFROM a\nCMD [\"b\"]\n"},
		"LegacyKeyValueFormat": {src: "FROM x\nENV A b c\nLABEL d e\n", want: []string{
			`2 LegacyKeyValueFormat: "ENV key=value" should be used instead of legacy "ENV key value" format | write ENV A="b c"`,
			`3 LegacyKeyValueFormat: "LABEL key=value" should be used instead of legacy "LABEL key value" format | write LABEL d=e`,
		}},
		"RedundantTargetPlatform": {src: "FROM --platform=$TARGETPLATFORM x\n", want: []string{
			"1 RedundantTargetPlatform: Setting platform to predefined $TARGETPLATFORM in FROM is redundant as this is the default behavior | leave --platform=$TARGETPLATFORM out",
		}},
		"FromPlatformFlagConstDisallowed": {src: "FROM --platform=linux/amd64 x AS a\nFROM --platform=linux/arm64 x AS arm64\nFROM --platform=$BUILDPLATFORM x\n", want: []string{
			`1 FromPlatformFlagConstDisallowed: FROM --platform flag should not use constant value "linux/amd64" | leave --platform out and build with --platform linux/amd64, or write --platform=$BUILDPLATFORM, or name the stage after the platform`,
		}},
		"SecretsUsedInArgOrEnv": {src: "FROM x\nARG DB_PASSWORD\nENV GITHUB_TOKEN=x\nARG PUBLIC_KEY MONKEY TOKEN_FILE keyboard\n", want: []string{
			`2 SecretsUsedInArgOrEnv: Do not use ARG or ENV instructions for sensitive data (ARG "DB_PASSWORD") | give it to the RUN that needs it, with RUN --mount=type=secret,id=db_password,env=DB_PASSWORD ..., and build with --secret id=db_password: it is in no layer and no history then`,
			`3 SecretsUsedInArgOrEnv: Do not use ARG or ENV instructions for sensitive data (ENV "GITHUB_TOKEN") | give it to the RUN that needs it, with RUN --mount=type=secret,id=github_token,env=GITHUB_TOKEN ..., and build with --secret id=github_token: it is in no layer and no history then`,
		}},
		"EXPOSE": {src: "FROM x\nEXPOSE 80/TCP 127.0.0.1:8080:81 1-3 5:5\n", want: []string{
			"2 ExposeInvalidFormat: EXPOSE instruction should not define an IP address or host-port mapping, found '127.0.0.1:8080:81' | write EXPOSE 81/tcp; the host's side is said by run -p 127.0.0.1:8080:81",
			"2 ExposeInvalidFormat: EXPOSE instruction should not define an IP address or host-port mapping, found '5:5' | write EXPOSE 5/tcp; the host's side is said by run -p 5:5",
			"2 ExposeProtoCasing: Defined protocol '80/TCP' in EXPOSE instruction should be lowercase | write EXPOSE 80/tcp",
		}},
		"InvalidDefinitionDescription": {src: "# the base\nFROM x AS a\n# V is it\nARG V\n# W\n# is it\nARG W\n\n# no description\n#\nARG X\n", options: &all, want: []string{
			"2 InvalidDefinitionDescription: Comment for FROM should follow the format: `# a <description>` | write \"# a the base\", or put a line with # alone between if the comment is no description",
			"7 InvalidDefinitionDescription: Comment for ARG should follow the format: `# W <description>` | write \"# W is it\", or put a line with # alone between if the comment is no description",
		}},
		"experimental ones are off": {src: "# the base\nFROM x AS a\n"},
		"skip one":                  {src: "# check=skip=StageNameCasing,NoSuchRule\nFROM x AS A\nMAINTAINER b\n", want: []string{`3 MaintainerDeprecated: Maintainer instruction is deprecated in favor of using label | write LABEL org.opencontainers.image.authors="b"`}},
		"skip all":                  {src: "# syntax=docker/dockerfile:1\n# check=skip=all\nFROM x AS A\nMAINTAINER b\n"},
		"skip for one instruction":  {src: "FROM x\n# check=skip=UndefinedVar\nCOPY $a b\nCOPY c $PATHS\n", want: []string{"4 UndefinedVar: Usage of undefined variable '$PATHS' (did you mean $PATH?) | write $PATH, or declare PATHS above with ARG or ENV"}},
		"an experimental one":       {src: "# check=experimental=InvalidDefinitionDescription\n# the base\nFROM x AS a\n", want: []string{"3 InvalidDefinitionDescription: Comment for FROM should follow the format: `# a <description>` | write \"# a the base\", or put a line with # alone between if the comment is no description"}},
		"the option goes before":    {src: "# check=skip=all\nFROM x AS A\n", options: new(string), want: []string{"2 StageNameCasing: Stage name 'A' should be lowercase | write AS a"}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := checked(t, c.src, c.options)
			if !slices.Equal(got, c.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
			if err != nil {
				t.Errorf("%v, though it is no error", err)
			}
		})
	}
}

func TestChecksAsErrors(t *testing.T) {
	_, err := checked(t, "# check=error=true\nFROM x AS A\nMAINTAINER b\n", nil)
	if err == nil || err.Error() != "lint violation found for rules: MaintainerDeprecated, StageNameCasing" {
		t.Error(err)
	}
	if _, err := checked(t, "# check=error=true\nFROM x\n", nil); err != nil {
		t.Error(err)
	}
	for src, want := range map[string]string{
		"# check=skip\nFROM x\n":                                 "dockerfile parse error on line 1: check directive: invalid check option \"skip\"",
		"# syntax=docker/dockerfile:1\n# check=error=no\nFROM x": "dockerfile parse error on line 2: check directive: failed to parse check option",
		"# check=fix=all\nFROM x\n":                              "dockerfile parse error on line 1: check directive: invalid check option \"fix\"",
	} {
		f, err := Parse("D", []byte(src))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Check(nil); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v, want %s", src, err, want)
		}
	}
}

func TestSyntax(t *testing.T) {
	for src, want := range map[string]string{
		"# syntax=docker/dockerfile:1\nFROM x":                               "docker/dockerfile:1",
		"#syntax = docker.io/docker/dockerfile:1.7-labs\n# escape=`\nFROM x": "docker.io/docker/dockerfile:1.7-labs",
		"\xef\xbb\xbf# syntax=docker/dockerfile\nFROM x":                     "docker/dockerfile",
		"#!/usr/bin/env x\n# syntax=docker/dockerfile:1\nFROM x":             "docker/dockerfile:1",
		"# escape=`\n# syntax=a.b/docker/dockerfile@sha256:0\nFROM x":        "a.b/docker/dockerfile@sha256:0",
		"FROM x\n# syntax=docker/dockerfile:1":                               "",
		"\n# syntax=docker/dockerfile:1\nFROM x":                             "",
		"# a comment\n# syntax=docker/dockerfile:1\nFROM x":                  "",
	} {
		f, err := Parse("D", []byte(src))
		if err != nil || f.Syntax != want || !OwnSyntax(f.Syntax) {
			t.Errorf("%q: %+v, %v", src, f, err)
		}
	}
	for src, want := range map[string]string{
		"// syntax=example.com/x:1\nthing {}\n": "line 1 asks for the front end example.com/x:1, but conex reads Dockerfiles only",
		`{"syntax": "example.com/x:1", "a": 1}`: "line 1 asks for the front end example.com/x:1",
		"# syntax=example.com/x:1\nthing {}\n":  "line 1 asks for the front end example.com/x:1",
		"# escape=x\nFROM x":                    "invalid escape token",
		"# escape=`\n# escape=`\nFROM x":        "only one escape parser directive",
		"# syntax=a\n# syntax=b\nFROM x":        "only one syntax parser directive",
	} {
		if _, err := Parse("D", []byte(src)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", src, err, want)
		}
	}
}

func TestPorts(t *testing.T) {
	for word, want := range map[string]string{
		"80": "80-80/tcp", "80/": "80-80/tcp", "0": "0-0/tcp", "80/UDP": "80-80/udp upper", "1-3/sctp": "1-3/sctp", "8080:80": "80-80/tcp host", "1-3:4-6": "4-6/tcp host",
		"1-9:80": "80-80/tcp host", "[::1]:1:2": "2-2/tcp host", "127.0.0.1::80": "80-80/tcp host", ":80": "80-80/tcp",
		"": "no port specified", "a": "invalid containerPort: a", "65536": "invalid containerPort: 65536", "3-1": "invalid containerPort: 3-1", "-1": "invalid containerPort: -1",
		"80/icmp": "invalid proto: icmp", "x:80": "invalid hostPort: x", "x:1:80": "invalid IP address: x", "1-2:4-9": "invalid ranges", "/tcp": "no port specified",
	} {
		p, err := parsePort(word)
		got := fmt.Sprintf("%d-%d/%s", p.first, p.last, p.proto)
		if p.upper {
			got += " upper"
		}
		if p.host {
			got += " host"
		}
		if err != nil {
			got = err.Error()
		}
		if err != nil && !strings.Contains(got, want) || err == nil && got != want {
			t.Errorf("%q: %s, want %s", word, got, want)
		}
	}
}
