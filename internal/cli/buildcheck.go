package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"

	"conex/internal/build"
	"conex/internal/dockerfile"
	"conex/internal/engine"
)

// callFlag is --call: what to do with a Dockerfile instead of building it.
type callFlag struct {
	name         string // "", check, outline, targets
	json         bool
	ignoreStatus bool
}

func (c *callFlag) Set(s string) error {
	*c = callFlag{}
	for i, field := range strings.Split(s, ",") {
		k, v, ok := strings.Cut(field, "=")
		switch {
		case !ok && i == 0:
			switch field {
			case "check", "lint":
				c.name = "check"
			case "outline", "targets":
				c.name = field
			case "build":
			default:
				return fmt.Errorf("unknown call %q: must be one of build, check, outline, targets", field)
			}
		case ok && k == "format" && (v == "json" || v == "text"):
			c.json = v == "json"
		case ok && k == "format":
			return fmt.Errorf("invalid format %q: must be json or text", v)
		case ok && k == "ignorestatus":
			b, err := strconv.ParseBool(v)
			if err != nil {
				return fmt.Errorf("invalid ignorestatus value: %s", v)
			}
			c.ignoreStatus = b
		default:
			return fmt.Errorf("invalid call field: %s", field)
		}
	}
	return nil
}

func (c *callFlag) Type() string   { return "string" }
func (c *callFlag) String() string { return "build" }

// buildCall answers --check and --call.
func (a *app) buildCall(ctx context.Context, e *engine.Engine, c *callFlag, req engine.BuildRequest) error {
	switch c.name {
	case "outline":
		out, err := e.BuildOutline(ctx, req)
		if err != nil {
			return err
		}
		if c.json {
			return a.printIndented(out)
		}
		return a.printOutline(out)
	case "targets":
		out, err := e.BuildTargets(ctx, req)
		if err != nil {
			return err
		}
		if c.json {
			return a.printIndented(out)
		}
		return a.printTargets(out)
	}
	res, err := e.BuildCheck(ctx, req)
	if err != nil {
		return err
	}
	if c.json {
		err = a.printIndented(checkJSON(res))
	} else {
		err = a.printChecks(res)
	}
	switch {
	case err != nil:
		return err
	case res.Err != nil:
		return res.Err
	case len(res.Findings) > 0 && !c.ignoreStatus:
		return exit(1)
	}
	return nil
}

func (a *app) printIndented(v any) error {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(a.out, "%s\n", raw)
	return err
}

// printChecks prints what `docker build --check` does, and how to mend it.
func (a *app) printChecks(res engine.BuildCheckResult) error {
	switch n := len(res.Findings); {
	case n == 0 && res.Err == nil:
		fmt.Fprintln(a.out, "Check complete, no warnings found.")
	case n == 1:
		fmt.Fprintln(a.out, "Check complete, 1 warning has been found!")
	case n > 1:
		fmt.Fprintf(a.out, "Check complete, %d warnings have been found!\n", n)
	}
	const rule = "--------------------"
	for _, f := range res.Findings {
		fmt.Fprintf(a.out, "\nWARNING: %s - %s\n%s\n", f.Rule, f.Description, f.Detail)
		fmt.Fprintf(a.out, "%s:%d\n%s\n%s\n%s\n", res.File.Name, f.Lines.First, rule, res.File.Excerpt(f.Lines), rule)
		fmt.Fprintf(a.out, "To mend it: %s\n", f.Mend)
	}
	return nil
}

// The JSON of --call check,format=json is BuildKit's, with "mend" added.
type (
	checkReport struct {
		Warnings []checkWarning `json:"warnings"`
		Sources  []checkSource  `json:"sources"`
		Error    *checkError    `json:"buildError,omitempty"`
	}
	checkWarning struct {
		Rule        string          `json:"ruleName"`
		Description string          `json:"description,omitempty"`
		URL         string          `json:"url,omitempty"`
		Detail      string          `json:"detail,omitempty"`
		Mend        string          `json:"mend,omitempty"`
		Location    *build.Location `json:"location,omitempty"`
	}
	checkSource struct {
		Filename string `json:"filename"`
		Data     []byte `json:"data"`
		Language string `json:"language"`
	}
	checkError struct {
		Message  string          `json:"message"`
		Location *build.Location `json:"location,omitempty"`
	}
)

func checkJSON(res engine.BuildCheckResult) checkReport {
	r := checkReport{Warnings: []checkWarning{}, Sources: []checkSource{{res.File.Name, res.File.Source, "Dockerfile"}}}
	for _, f := range res.Findings {
		r.Warnings = append(r.Warnings, checkWarning{f.Rule, f.Description, f.URL, f.Detail, f.Mend, build.LocationOf(f.Lines)})
	}
	if res.Err != nil {
		msg, _, _ := strings.Cut(res.Err.Error(), "\n")
		r.Error = &checkError{Message: msg}
		if at := build.Place(res.Err); at.First > 0 {
			r.Error.Location = build.LocationOf(at)
		}
	}
	return r
}

func (a *app) printOutline(o engine.BuildOutline) error {
	if o.Name != "" || o.Description != "" {
		w := tabwriter.NewWriter(a.out, 0, 0, 1, ' ', 0)
		name := o.Name
		if name == "" {
			name = "(default)"
		}
		fmt.Fprintf(w, "TARGET:\t%s\n", name)
		if o.Description != "" {
			fmt.Fprintf(w, "DESCRIPTION:\t%s\n", o.Description)
		}
		w.Flush()
		fmt.Fprintln(a.out)
	}
	if len(o.Args) > 0 {
		w := tabwriter.NewWriter(a.out, 0, 0, 3, ' ', 0)
		fmt.Fprint(w, "BUILD ARG\tVALUE\tDESCRIPTION\n")
		for _, x := range o.Args {
			fmt.Fprintf(w, "%s\t%s\t%s\n", x.Name, x.Value, x.Description)
		}
		w.Flush()
		fmt.Fprintln(a.out)
	}
	for _, t := range []struct {
		title string
		list  []build.OutlineNeed
	}{{"SECRET", o.Secrets}, {"SSH", o.SSH}} {
		if len(t.list) == 0 {
			continue
		}
		w := tabwriter.NewWriter(a.out, 0, 0, 3, ' ', 0)
		fmt.Fprintf(w, "%s\tREQUIRED\n", t.title)
		for _, n := range t.list {
			required := ""
			if n.Required {
				required = "true"
			}
			fmt.Fprintf(w, "%s\t%s\n", n.Name, required)
		}
		w.Flush()
		fmt.Fprintln(a.out)
	}
	return nil
}

func (a *app) printTargets(t engine.BuildTargets) error {
	w := tabwriter.NewWriter(a.out, 0, 0, 1, ' ', 0)
	fmt.Fprint(w, "TARGET\tDESCRIPTION\n")
	for _, x := range t.Targets {
		name := x.Name
		switch {
		case name == "" && x.Default:
			name = "(default)"
		case x.Default:
			name += " (default)"
		}
		fmt.Fprintf(w, "%s\t%s\n", name, x.Description)
	}
	return w.Flush()
}

// findings collects what the checks find during a build, to be told together when it is over.
type findings struct {
	list []dockerfile.Finding
	text []string
}

// through gives a display that collects from what another one shows.
func (f *findings) through(d build.Display) build.Display {
	return func(ev build.Event) {
		if ev.Finding != nil {
			f.list, f.text = append(f.list, *ev.Finding), append(f.text, ev.Text)
		}
		d(ev)
	}
}

// tell lists the findings; with details, what each rule wants and how to mend it.
func (f *findings) tell(a *app, details bool) {
	if len(f.list) == 0 {
		return
	}
	s, how := "s", " (build --check shows them with how to mend them)"
	if len(f.list) == 1 {
		s, how = "", " (build --check shows it with how to mend it)"
	}
	if details {
		how = ""
	}
	fmt.Fprintf(a.err, "\n %d warning%s found%s:\n", len(f.list), s, how)
	for i, x := range f.list {
		fmt.Fprintf(a.err, " - %s\n", f.text[i])
		if details {
			fmt.Fprintf(a.err, "   %s\n   to mend it: %s\n", x.Description, x.Mend)
		}
	}
}
