package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) eventsCommand() *cobra.Command {
	var since, until, format string
	var filters filterFlag
	cmd := &cobra.Command{
		Use: "events [OPTIONS]", Short: "Get real time events", Args: a.exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			now := time.Now()
			var req engine.EventsRequest
			var err error
			if req.Since, err = parseTime(since, now); err != nil {
				return a.usageError(cmd, fmt.Errorf("invalid value for \"since\": %w", err))
			}
			if req.Until, err = parseTime(until, now); err != nil {
				return a.usageError(cmd, fmt.Errorf("invalid value for \"until\": %w", err))
			}
			req.Filters = filters.m
			line, err := eventLine(format)
			if err != nil {
				return err
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			return e.Events(ctx, req, func(ev events.Message) error {
				b, err := line(ev)
				if err != nil {
					return err
				}
				_, err = a.out.Write(append(b, '\n'))
				return err
			})
		},
	}
	f := cmd.Flags()
	f.VarP(&filters, "filter", "f", "Filter output based on conditions provided")
	f.StringVar(&format, "format", "", `Format output using a custom template: "json" or "TEMPLATE" (a Go template)`)
	f.StringVar(&since, "since", "", "Show all events created since timestamp")
	f.StringVar(&until, "until", "", "Stream events until this timestamp")
	return cmd
}

// event is what templates see: Docker's message, with the names that it had in older versions.
type event struct{ events.Message }

// ID is the actor's.
func (e event) ID() string { return e.Actor.ID }

// Status is the action.
func (e event) Status() string { return string(e.Action) }

// From is the image of a container's event.
func (e event) From() string { return e.Actor.Attributes["image"] }

// eventLine returns what makes a line of an event.
func eventLine(format string) (func(events.Message) ([]byte, error), error) {
	switch format {
	case "":
		return func(ev events.Message) ([]byte, error) { return []byte(eventText(&ev)), nil }, nil
	case "json":
		return func(ev events.Message) ([]byte, error) { return json.Marshal(ev) }, nil
	}
	t, err := parseTemplate(strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(format))
	if err != nil {
		return nil, &exitError{code: 64, err: err}
	}
	// A field that there is not is known before the first event comes.
	if err := execute(&bytes.Buffer{}, t, event{}); unknownField(err) {
		return nil, &exitError{code: 64, err: err}
	}
	return func(ev events.Message) ([]byte, error) {
		var b bytes.Buffer
		err := execute(&b, t, event{ev})
		return b.Bytes(), err
	}, nil
}

// eventText is an event as people read it. Names, labels and commands are anybody's: they get no control over the terminal.
func eventText(ev *events.Message) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %s %s", time.Unix(0, ev.TimeNano).Format("2006-01-02T15:04:05.000000000Z07:00"), ev.Type, ev.Action, ev.Actor.ID)
	if len(ev.Actor.Attributes) > 0 {
		var attrs []string
		for _, k := range slices.Sorted(maps.Keys(ev.Actor.Attributes)) {
			attrs = append(attrs, k+"="+ev.Actor.Attributes[k])
		}
		fmt.Fprintf(&b, " (%s)", strings.Join(attrs, ", "))
	}
	return clean(strings.ReplaceAll(b.String(), "\n", " "))
}
