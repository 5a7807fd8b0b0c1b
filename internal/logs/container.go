package logs

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"text/template"
	"time"

	"conex/internal/container"
)

// Container is what drivers and tags may say of the container whose output they log; tags name its fields and methods, which are Docker's.
type Container struct {
	ContainerID, ContainerName           string
	ContainerEntrypoint                  string
	ContainerArgs                        []string
	ContainerImageID, ContainerImageName string
	ContainerCreated                     time.Time
	ContainerEnv                         []string
	ContainerLabels                      map[string]string
	// DaemonName is "conex".
	DaemonName string
	// Config are the log's options.
	Config map[string]string
}

// Describe says of a container what its record does.
func Describe(r *container.Record) Container {
	c := Container{
		ContainerID: r.ID, ContainerName: "/" + r.Name, ContainerEntrypoint: r.Path, ContainerArgs: r.Args,
		ContainerImageID: string(r.ImageID), ContainerImageName: r.Image, ContainerCreated: r.Created, DaemonName: "conex",
		Config: r.HostConfig.LogConfig.Config,
	}
	if r.Config != nil {
		c.ContainerEnv, c.ContainerLabels = r.Config.Env, r.Config.Labels
	}
	return c
}

// ID is the container's id, short.
func (c *Container) ID() string { return short(c.ContainerID) }

// FullID is the container's id.
func (c *Container) FullID() string { return c.ContainerID }

// Name is the container's name.
func (c *Container) Name() string { return strings.TrimPrefix(c.ContainerName, "/") }

// ImageID is the image's id, short.
func (c *Container) ImageID() string { return short(c.ContainerImageID) }

// ImageFullID is the image's id.
func (c *Container) ImageFullID() string { return c.ContainerImageID }

// ImageName is what the image was called at create.
func (c *Container) ImageName() string { return c.ContainerImageName }

// Command is the container's command line.
func (c *Container) Command() string {
	return strings.Join(append([]string{c.ContainerEntrypoint}, c.ContainerArgs...), " ")
}

func short(id string) string {
	if _, hex, ok := strings.Cut(id, ":"); ok {
		id = hex
	}
	return id[:min(len(id), 12)]
}

// defaultTag is what syslog and journald call the container.
const defaultTag = "{{.ID}}"

func parseTag(text string) (*template.Template, error) {
	return template.New("log-tag").Funcs(template.FuncMap{
		"json": func(v any) (string, error) {
			b, err := json.Marshal(v)
			return string(b), err
		},
		"split": strings.Split, "join": strings.Join, "lower": strings.ToLower, "upper": strings.ToUpper,
		"title":    func(s string) string { return strings.ToUpper(s[:min(1, len(s))]) + s[min(1, len(s)):] },
		"truncate": func(s string, n int) string { return s[:min(len(s), max(n, 0))] },
	}).Parse(text)
}

// tag fills a template in.
func (c *Container) tag(text string) (string, error) {
	if text == defaultTag {
		return c.ID(), nil
	}
	t, err := parseTag(text)
	if err != nil {
		return "", fmt.Errorf("log option tag: %w", err)
	}
	var b strings.Builder
	if err := t.Execute(&b, c); err != nil {
		return "", fmt.Errorf("log option tag: %w", err)
	}
	return b.String(), nil
}

// attributes are the labels and variables that the options choose, and the tag if they have one.
func (c *Container) attributes(o Options) (map[string]string, error) {
	attrs := map[string]string{}
	matcher := func(names []string, expr string) (func(string) bool, error) {
		var re *regexp.Regexp
		if expr != "" {
			var err error
			if re, err = regexp.Compile(expr); err != nil {
				return nil, fmt.Errorf("log option: %w", err)
			}
		}
		return func(k string) bool { return slices.Contains(names, k) || re != nil && re.MatchString(k) }, nil
	}
	if len(o.Labels) > 0 || o.LabelsRegex != "" {
		wanted, err := matcher(o.Labels, o.LabelsRegex)
		if err != nil {
			return nil, err
		}
		for k, v := range c.ContainerLabels {
			if wanted(k) {
				attrs[k] = v
			}
		}
	}
	if len(o.Env) > 0 || o.EnvRegex != "" {
		wanted, err := matcher(o.Env, o.EnvRegex)
		if err != nil {
			return nil, err
		}
		for _, kv := range c.ContainerEnv {
			if k, v, ok := strings.Cut(kv, "="); ok && wanted(k) {
				attrs[k] = v
			}
		}
	}
	if o.Tag != "" && (o.Driver == JSONFile || o.Driver == Local) {
		var err error
		if attrs["tag"], err = c.tag(o.Tag); err != nil {
			return nil, err
		}
	}
	return attrs, nil
}

// Details is what `logs --details` puts before each line: the attributes that the options choose, sorted, as Docker writes them.
func (c *Container) Details(o Options) (string, error) {
	attrs, err := c.attributes(o)
	if err != nil {
		return "", err
	}
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(attrs)) {
		parts = append(parts, url.QueryEscape(k)+"="+url.QueryEscape(attrs[k]))
	}
	return strings.Join(parts, ",") + " ", nil
}
