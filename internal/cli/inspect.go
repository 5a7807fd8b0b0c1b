package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"conex/internal/container"
	"conex/internal/engine"
	"conex/internal/image"
	"conex/internal/plainjson"
)

func (a *app) inspectCommand() *cobra.Command {
	var format, kind string
	var size bool
	cmd := &cobra.Command{
		Use: "inspect [OPTIONS] NAME|ID [NAME|ID...]", Short: "Return low-level information on Docker objects", Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("type") && kind == "" {
				return errors.New(`type is empty: must be one of "container", "image", "network", "volume"`)
			}
			var find []func(context.Context, string) (any, error)
			switch kind {
			case "":
				find = append(find, a.findContainer(size), a.findImage(""), a.findNetwork(), a.findVolume())
			case "container":
				find = append(find, a.findContainer(size))
			case "image":
				find = append(find, a.findImage(""))
			case "network":
				find = append(find, a.findNetwork())
			case "volume":
				find = append(find, a.findVolume())
			case "config", "node", "plugin", "secret", "service", "swarm", "task":
				return fmt.Errorf("--type %s is not supported yet: must be one of \"container\", \"image\", \"network\", \"volume\"", kind)
			default:
				return fmt.Errorf("unknown type: %q: must be one of \"container\", \"image\", \"network\", \"volume\"", kind)
			}
			return a.inspect(cmd.Context(), args, format, func(ctx context.Context, name string) (any, error) {
				for _, f := range find {
					v, err := f(ctx, name)
					if err == nil || !isNotFound(err) {
						return v, err
					}
					if kind != "" {
						return nil, err
					}
				}
				return nil, &objectError{name}
			})
		},
	}
	f := cmd.Flags()
	f.StringVarP(&format, "format", "f", "", inspectHelp)
	f.BoolVarP(&size, "size", "s", false, "Display total file sizes if the type is container")
	f.StringVar(&kind, "type", "", "Only inspect objects of the given type")
	return cmd
}

const inspectHelp = `Format output using a custom template: "json" or "TEMPLATE" (a Go template)`

// containerInspect and imageInspect are the commands of the groups, which look for one kind of thing.
func (a *app) containerInspect() *cobra.Command {
	var format string
	var size bool
	cmd := &cobra.Command{
		Use: "inspect [OPTIONS] CONTAINER [CONTAINER...]", Short: "Display detailed information on one or more containers", Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.inspect(cmd.Context(), args, format, a.findContainer(size))
		},
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", inspectHelp)
	cmd.Flags().BoolVarP(&size, "size", "s", false, "Display total file sizes")
	return cmd
}

func (a *app) imageInspect() *cobra.Command {
	var format, platform string
	cmd := &cobra.Command{
		Use: "inspect [OPTIONS] IMAGE [IMAGE...]", Short: "Display detailed information on one or more images", Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.inspect(cmd.Context(), args, format, a.findImage(platform))
		},
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", inspectHelp)
	cmd.Flags().StringVar(&platform, "platform", "", "Inspect the image of a platform that the name leads to (os[/arch[/variant]])")
	return cmd
}

func (a *app) findContainer(size bool) func(context.Context, string) (any, error) {
	return func(ctx context.Context, name string) (any, error) {
		e, err := a.engine()
		if err != nil {
			return nil, err
		}
		return e.InspectContainer(ctx, name, size)
	}
}

func (a *app) findImage(platform string) func(context.Context, string) (any, error) {
	return func(ctx context.Context, name string) (any, error) {
		e, err := a.engine()
		if err != nil {
			return nil, err
		}
		return e.InspectImage(ctx, name, platform)
	}
}

func isNotFound(err error) bool {
	return errors.Is(err, container.ErrNotFound) || errors.Is(err, image.ErrNotFound) || errors.Is(err, image.ErrReference) || errors.Is(err, engine.ErrNotFound)
}

// inspect prints what find returns for each name: as a JSON array, or each by the template. What was found is printed even if
// something was not.
func (a *app) inspect(ctx context.Context, names []string, format string, find func(context.Context, string) (any, error)) error {
	if format != "" && format != "json" {
		if _, err := parseTemplate(format); err != nil {
			return &exitError{code: 64, err: err}
		}
	}
	var errs []error
	found := []any{}
	for _, n := range names {
		v, err := find(ctx, n)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		found = append(found, v)
	}
	var b bytes.Buffer
	switch format {
	case "", "json":
		indent := ""
		if format == "" {
			indent = "    "
		}
		text, err := plainjson.Print(found, indent)
		if err != nil {
			return err
		}
		b.Write(append(text, '\n'))
	default:
		for _, v := range found {
			if err := writeOne(&b, format, v); err != nil {
				errs = append(errs, err)
			}
		}
		if b.Len() == 0 {
			b.WriteByte('\n') // as Docker
		}
	}
	if _, err := a.out.Write(harmless(a.out, b.Bytes())); err != nil {
		return err
	}
	return errors.Join(errs...)
}
